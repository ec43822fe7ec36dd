"""Running an engine: contexts, static buffers and CUDA graphs.

Nothing here needs torch. Memory, streams and capture come from a `Memory`; `dit_export.tensorrt.
memory` has one for torch, one for cuda-core and one for pycuda.

>>> engine = TensorRTEngine("engines/transformer-0123456789abcdef.engine")
>>> engine.run(x=x, t=t, y=y)["output"]
"""

from __future__ import annotations

import queue
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_export.tensorrt.engine_files import EngineFile, EngineRefused, read_description
from dit_export.tensorrt.installed import CudaDevice, Flavour, choose_flavour, require_device
from dit_export.tensorrt.memory import Memory, make_memory
from dit_export.tensorrt.network import last_error, process_logger
from dit_export.tensorrt.profiles import choose_profile

CONTEXT_LIMIT = 4
"""A session is prepared for so many sets of shapes; beyond, it drops the one unused for longest."""

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64"}

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class LoadedEngine:
    """An engine in the device's memory. Its contexts share its weights.

    Raises `EngineRefused` for a file of another version or device, and for one that has changed.
    """

    def __init__(self, file: EngineFile, flavour: Flavour, device: CudaDevice) -> None:
        file.check(flavour.name, flavour.version, device)
        data = file.read()
        self.file = file
        self.trt = flavour.load()
        self.logger = process_logger(self.trt)
        self.logger.errors.clear()
        self.runtime = self.trt.Runtime(self.logger)
        self.engine = self.runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise EngineRefused(
                f"{file.path}: {flavour} cannot load it on {device}: {last_error(self.logger)}"
            )
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        kinds = {n: self.engine.get_tensor_dtype(n).name for n in names}
        self.inputs, self.outputs = tuple(file.inputs), tuple(file.outputs)
        if set(names) != {*self.inputs, *self.outputs} or set(kinds.values()) - set(_DTYPES):
            raise EngineRefused(f"{file.path}: its tensors are not those of {file.description}")
        self.dtypes = {name: _DTYPES[kind] for name, kind in kinds.items()}

    @property
    def captures_itself(self) -> bool:
        """TensorRT for RTX compiles kernels as it meets shapes, and knows when to capture them."""
        return hasattr(self.trt, "CudaGraphStrategy")

    def create_context(self, profile: int, stream: int, graphs: bool) -> Any:
        """An execution context of that profile; graphs: let it capture, if it can by itself."""
        configs = []
        if self.captures_itself and graphs:
            configs = [self.engine.create_runtime_config()]
            configs[0].cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        context = self.engine.create_execution_context(*configs)
        if context is None:
            reason = last_error(self.logger)
            raise MemoryError(f"{self.file.path}: out of memory for a context: {reason}")
        self.check(context.set_optimization_profile_async(profile, stream))
        return context

    def check(self, succeeded: bool) -> None:
        if not succeeded:
            raise RuntimeError(f"{self.file.path}: {last_error(self.logger)}")

    def choose_profile(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The profile for inputs of these shapes.

        Raises ValueError for another input or shape than the engine's, and for a batch or a size
        outside its profiles, which it names.
        """
        if set(shapes) != set(self.inputs):
            raise ValueError(f"inputs {sorted(shapes)}; {sorted(self.inputs)} are needed")
        rows, sides = set(), set()
        for name, shape in shapes.items():
            wanted = self.file.inputs[name]
            pairs = list(zip(shape, wanted, strict=False))
            if len(shape) != len(wanted) or any(w not in (n, -1) for n, w in pairs):
                raise ValueError(f"input {name} has shape {shape}; {wanted} is needed (-1 is free)")
            rows.add(shape[0])
            sides.add(tuple(n for n, w in pairs[1:] if w == -1))
        if len(rows) > 1:
            raise ValueError(f"inputs have different batches: {sorted(rows)}")
        free = next((s for s in sides if s), ())
        return choose_profile(self.file.key.profiles, rows.pop(), free)


@dataclass
class _Prepared:
    """The buffers of one set of input shapes, and what runs the engine on them. The context is kept
    because a captured graph uses its memory, but does not keep it."""

    context: Any
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    launch: Callable[[], None]


class Session:
    """One stream's way through an engine; for one thread at a time.

    graphs: replay a step as one CUDA graph from its second run on. TensorRT for RTX does so itself.
    """

    def __init__(self, engine: LoadedEngine, memory: Memory, graphs: bool = True) -> None:
        if graphs and not (memory.captures or engine.captures_itself):
            raise ValueError(f"{type(memory).__name__} captures no CUDA graphs: use graphs=False")
        self.engine, self.memory, self.graphs = engine, memory, graphs
        self._prepared: OrderedDict[Shapes, _Prepared] = OrderedDict()

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Arrays by input name → the caller's own arrays by output name."""
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        profile = self.engine.choose_profile(shapes)
        with self.memory.current():
            prepared = self._of(shapes, profile)
            for name, buffer in prepared.inputs.items():
                self.memory.write(buffer, inputs[name])
            prepared.launch()
            return {name: self.memory.read(buffer) for name, buffer in prepared.outputs.items()}

    def _of(self, shapes: dict[str, tuple[int, ...]], profile: int) -> _Prepared:
        key = tuple(sorted(shapes.items()))
        if key not in self._prepared:
            if len(self._prepared) >= CONTEXT_LIMIT:
                self.memory.synchronize()
                self._prepared.popitem(last=False)
            self._prepared[key] = self._prepare(shapes, profile)
        self._prepared.move_to_end(key)
        return self._prepared[key]

    def _prepare(self, shapes: dict[str, tuple[int, ...]], profile: int) -> _Prepared:
        engine, memory = self.engine, self.memory
        context = engine.create_context(profile, memory.stream, self.graphs)
        for name, shape in shapes.items():
            engine.check(context.set_input_shape(name, shape))
        buffers = {}
        for name in (*engine.inputs, *engine.outputs):
            shape = tuple(context.get_tensor_shape(name))
            buffers[name] = memory.empty(shape, engine.dtypes[name])
            context.set_tensor_address(name, memory.pointer(buffers[name]))

        def execute(stream: int) -> None:
            engine.check(context.execute_async_v3(stream))

        prepared = _Prepared(
            context,
            {name: buffers[name] for name in engine.inputs},
            {name: buffers[name] for name in engine.outputs},
            lambda: execute(memory.stream),
        )
        if self.graphs and not engine.captures_itself:

            def first() -> None:
                # What is done only once, such as loading kernels, must not be captured.
                execute(memory.stream)
                memory.synchronize()
                prepared.launch = memory.capture(execute)

            prepared.launch = first
        return prepared


class SessionPool:
    """Several streams for one engine: as many threads as there are sessions run at once."""

    def __init__(
        self,
        engine: LoadedEngine,
        make_memory: Callable[[], Memory],
        streams: int = 1,
        graphs: bool = True,
    ) -> None:
        if streams < 1:
            raise ValueError(f"streams {streams} is not a positive integer")
        self.engine = engine
        self._free: queue.LifoQueue[Session] = queue.LifoQueue()
        for _ in range(streams):
            self._free.put(Session(engine, make_memory(), graphs))

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        session = self._free.get()
        try:
            return session.run(inputs)
        finally:
            self._free.put(session)


class TensorRTEngine:
    """An engine file, ready to run on numpy arrays, without torch.

    Threads may share it; ``streams`` of them run at once.

    Args:
        path: of an engine that `dit-export tensorrt` built.
        memory: "cuda-core" or "pycuda", which captures no CUDA graphs.
        graphs: run each set of shapes as one CUDA graph; None is yes if ``memory`` can do that.

    Raises:
        EngineRefused (a ValueError): a file of another version or device, or one that has changed.
        BackendUnavailable: no GPU or no driver. ImportError: a package is missing.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        memory: str = "cuda-core",
        device: int = 0,
        streams: int = 1,
        graphs: bool | None = None,
    ) -> None:
        file = read_description(Path(path))
        gpu = require_device(device)
        flavour = choose_flavour(file.key.flavour)
        first = make_memory(memory, device)
        with first.current():  # the engine is loaded onto the current device
            loaded = LoadedEngine(file, flavour, gpu)
        graphs = first.captures if graphs is None else graphs
        self._pool = SessionPool(loaded, lambda: make_memory(memory, device), streams, graphs)

    def run(self, **inputs: Any) -> dict[str, Any]:
        """numpy arrays by input name → numpy arrays by output name.

        Raises ValueError for a batch outside the engine's profile, which it names.
        """
        return self._pool.run(inputs)
