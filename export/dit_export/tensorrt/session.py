"""Running an engine: device memory through torch or pycuda, contexts and CUDA graphs.

>>> engine = TensorRTEngine("engines/transformer-0123456789abcdef.engine")
>>> engine.run(x=x, t=t, y=y)["output"]
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from dit_engine.backends.capture import capture_graph
from dit_export.tensorrt.engine_files import EngineFile, EngineRefused, read_description
from dit_export.tensorrt.installed import (
    CudaDevice,
    Flavour,
    choose_flavour,
    last_error,
    process_logger,
)
from dit_export.tensorrt.profiles import Shape, choose_profile

CONTEXT_LIMIT = 4
"""A session is prepared for so many sets of shapes; beyond, it drops the one unused for longest."""

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64"}


class TorchMemory:
    """torch tensors on their own device. The stream waits for the caller's current stream, and what
    is read belongs to that stream."""

    def __init__(self, device: Any) -> None:
        import torch

        self._torch = torch
        self.device = torch.device(device)
        self._stream = torch.cuda.Stream(self.device)
        self.stream = self._stream.cuda_stream

    @contextmanager
    def current(self) -> Iterator[None]:
        """In this block the device is this thread's current one; its earlier work comes first."""
        with self._torch.cuda.device(self.device):
            self._stream.wait_stream(self._torch.cuda.current_stream(self.device))
            yield

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A new buffer, whose address never changes."""
        with self._torch.cuda.stream(self._stream):
            return self._torch.empty(shape, dtype=getattr(self._torch, dtype), device=self.device)

    def pointer(self, buffer: Any) -> int:
        return buffer.data_ptr()

    def write(self, buffer: Any, value: Any) -> None:
        """Copy the caller's array into a buffer of its shape."""
        with self._torch.cuda.stream(self._stream):
            buffer.copy_(value)

    def read(self, buffer: Any) -> Any:
        """A buffer's contents as a new array of the caller's."""
        # Copied on the stream on which the next run is queued too, so that the copy comes first.
        with self._torch.cuda.stream(self._stream):
            copy = buffer.clone()
        current = self._torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        copy.record_stream(current)
        return copy

    def capture(self, work: Callable[[int], None]) -> Callable[[], None]:
        """A function that runs ``work`` with the stream's handle, as a CUDA graph if it can be
        captured."""
        graph, _ = capture_graph(lambda: work(self.stream), self._stream, warmups=0)

        def launch() -> None:
            with self._torch.cuda.stream(self._stream):
                graph.replay()

        return launch

    def synchronize(self) -> None:
        self._stream.synchronize()


class PycudaMemory:
    """The same for numpy arrays. A buffer is (page-locked host array, device memory)."""

    def __init__(self, index: int = 0) -> None:
        try:
            self._cuda: Any = import_module("pycuda.driver")
        except ImportError as error:
            raise ImportError(
                f"pycuda cannot be imported ({error}): pip install 'dit-engine[pycuda]'"
            ) from None
        self._cuda.init()
        device = self._cuda.Device(index)
        self.gpu = CudaDevice(device.name(), ".".join(map(str, device.compute_capability())))
        self._context = device.retain_primary_context()
        with self.current():
            self._stream = self._cuda.Stream()
        self.stream = int(self._stream.handle)

    @contextmanager
    def current(self) -> Iterator[None]:
        self._context.push()
        try:
            yield
        finally:
            self._cuda.Context.pop()

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        array = self._cuda.pagelocked_empty(shape, np.dtype(dtype))
        return array, self._cuda.mem_alloc(max(array.nbytes, 1))

    def pointer(self, buffer: Any) -> int:
        return int(buffer[1])

    def write(self, buffer: Any, value: np.ndarray) -> None:
        np.copyto(buffer[0], value)
        self._cuda.memcpy_htod_async(buffer[1], buffer[0], self._stream)

    def read(self, buffer: Any) -> np.ndarray:
        self._cuda.memcpy_dtoh_async(buffer[0], buffer[1], self._stream)
        self.synchronize()
        return buffer[0].copy()

    def capture(self, work: Callable[[int], None]) -> Callable[[], None]:
        return lambda: work(self.stream)  # pycuda captures no CUDA graphs

    def synchronize(self) -> None:
        self._stream.synchronize()


Memory = TorchMemory | PycudaMemory


@dataclass
class _Prepared:
    """The buffers of one set of input shapes, and what runs the engine on them. The context is kept
    because a captured graph uses its memory, but does not keep it."""

    context: Any
    buffers: dict[str, Any]
    launch: Callable[[], None]


class Session:
    """An engine in the memory of the device that is current, ready to run. Threads take turns.

    From its second run on, a step is replayed as one CUDA graph, if ``memory`` can capture that.

    Raises `EngineRefused` for a file of another version or device, and for one that has changed.
    """

    def __init__(
        self, file: EngineFile, flavour: Flavour, device: CudaDevice, memory: Memory
    ) -> None:
        file.check(flavour.name, flavour.version, device)
        data = file.read()
        self.file, self.memory = file, memory
        self.trt = trt = flavour.load()
        self.logger = process_logger(trt)
        self.logger.errors.clear()
        self.runtime = trt.Runtime(self.logger)
        self.engine = self.runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            reason = last_error(self.logger)
            raise EngineRefused(f"{file.path}: {flavour} cannot load it on {device}: {reason}")
        self.inputs: dict[str, Shape] = {}
        self.outputs: list[str] = []
        for name in map(self.engine.get_tensor_name, range(self.engine.num_io_tensors)):
            if self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                self.inputs[name] = tuple(self.engine.get_tensor_shape(name))
            else:
                self.outputs.append(name)
        # TensorRT for RTX compiles kernels as it meets shapes, and knows when to capture them.
        self.captures_itself = hasattr(trt, "CudaGraphStrategy")
        self._prepared: OrderedDict[Any, _Prepared] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Arrays by input name → the caller's own arrays by output name.

        Raises ValueError, which names the profiles, for inputs that do not fit the engine.
        """
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        key = tuple(sorted(shapes.items()))
        with self._lock, self.memory.current():
            if key not in self._prepared:
                self._prepared[key] = self._prepare(shapes)
            self._prepared.move_to_end(key)
            prepared = self._prepared[key]
            for name, value in inputs.items():
                self.memory.write(prepared.buffers[name], value)
            prepared.launch()
            return {name: self.memory.read(prepared.buffers[name]) for name in self.outputs}

    def _prepare(self, shapes: dict[str, Shape]) -> _Prepared:
        memory = self.memory
        profile = choose_profile(self.file.key.profiles, self.inputs, shapes)
        if len(self._prepared) >= CONTEXT_LIMIT:
            memory.synchronize()
            self._prepared.popitem(last=False)
        configs = []
        if self.captures_itself:
            configs = [self.engine.create_runtime_config()]
            configs[0].cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        context = self.engine.create_execution_context(*configs)
        if context is None:
            reason = last_error(self.logger)
            raise MemoryError(f"{self.file.path}: out of memory for a context: {reason}")
        self._check(context.set_optimization_profile_async(profile, memory.stream))
        for name, shape in shapes.items():
            self._check(context.set_input_shape(name, shape))
        buffers = {}
        for name in (*self.inputs, *self.outputs):
            dtype = _DTYPES[self.engine.get_tensor_dtype(name).name]
            buffers[name] = memory.empty(tuple(context.get_tensor_shape(name)), dtype)
            context.set_tensor_address(name, memory.pointer(buffers[name]))

        def execute(stream: int) -> None:
            self._check(context.execute_async_v3(stream))

        def first() -> None:
            # What is done only once, such as loading kernels, must not be captured.
            execute(memory.stream)
            memory.synchronize()
            prepared.launch = memory.capture(execute)

        prepared = _Prepared(context, buffers, lambda: execute(memory.stream))
        if not self.captures_itself:
            prepared.launch = first
        return prepared

    def _check(self, succeeded: bool) -> None:
        if not succeeded:
            raise RuntimeError(f"{self.file.path}: {last_error(self.logger)}")


class TensorRTEngine:
    """An engine that `dit-export tensorrt` built, run on numpy arrays through pycuda, without
    torch.

    Raises `EngineRefused` (a ValueError) for a file of another version or device, and for one that
    has changed, and ImportError if a package is missing.
    """

    def __init__(self, path: str | Path, device: int = 0) -> None:
        file = read_description(Path(path))
        flavour, memory = choose_flavour(file.key.flavour), PycudaMemory(device)
        with memory.current():
            self._session = Session(file, flavour, memory.gpu, memory)

    def run(self, **inputs: Any) -> dict[str, Any]:
        """numpy arrays by input name → numpy arrays by output name; see `Session.run`."""
        return self._session.run(inputs)
