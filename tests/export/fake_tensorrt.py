"""Stand-ins on the host for what of TensorRT and CUDA needs a driver: an engine of any function.

The engine reads and writes the addresses that it was given, as the real one does, so that a wrong
address, shape or order of calls gives wrong numbers.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np

from dit_export.tensorrt.engine_files import EngineFile

Arrays = dict[str, np.ndarray]
CAPTURING = -1  # the stream of a capture, on which work is noted and not done


class FakeContext:
    def __init__(self, engine: FakeEngine, config: Any) -> None:
        self.engine, self.captures, self.executions = engine, config is not None, 0
        self.profile = -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.set_tensor_address = self.addresses.__setitem__

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return bool(stream)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] in self.engine.profiles[self.profile].batch

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch = next(iter(self.shapes.values()))[0]
        free = self.engine.get_tensor_shape(name)
        return self.shapes.get(name) or tuple(batch if n == -1 else n for n in free)

    def execute_async_v3(self, stream: int) -> bool:
        if stream != CAPTURING:
            self.run()
        return True

    def run(self) -> None:
        self.executions += 1
        values = self.engine.function({name: self._array(name) for name in self.engine.inputs})
        for name in self.engine.outputs:
            np.copyto(self._array(name), values[name])

    def _array(self, name: str) -> np.ndarray:
        shape, dtype = self.get_tensor_shape(name), np.dtype(self.engine.dtypes[name])
        size = int(np.prod(shape) * dtype.itemsize)
        raw: Any = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(raw, dtype).reshape(shape)


class Handle:
    """What the caller has of a context, which real TensorRT destroys with it."""

    def __init__(self, context: FakeContext) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class FakeEngine:
    """inputs, outputs: name → shape, -1 for the batch; dtypes: of what is not float32."""

    def __init__(
        self,
        file: EngineFile,
        function: Callable[[Arrays], Arrays],
        inputs: dict[str, tuple[int, ...]],
        outputs: dict[str, tuple[int, ...]],
        dtypes: dict[str, str],
    ) -> None:
        self.profiles, self.function = file.key.profiles, function
        self.inputs, self.outputs = inputs, outputs
        self.num_io_tensors = len(inputs | outputs)
        self.get_tensor_name = list(inputs | outputs).__getitem__
        self.get_tensor_shape = (inputs | outputs).__getitem__
        self.get_tensor_mode = lambda name: "in" if name in inputs else "out"
        self.dtypes = dict.fromkeys(inputs | outputs, "float32") | dtypes
        self.contexts: list[FakeContext] = []
        self.handles: list[weakref.ref[Handle]] = []
        self.create_runtime_config = SimpleNamespace

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name={"float32": "FLOAT", "int64": "INT64"}[self.dtypes[name]])

    def create_execution_context(self, config: Any = None) -> Handle:
        self.contexts.append(FakeContext(self, config))
        handle = Handle(self.contexts[-1])
        self.handles.append(weakref.ref(handle))
        return handle


class FakeFlavour:
    """Stands for a `Flavour`; engine: what a file turns into, None if it is refused."""

    name, version = "rtx", "1.7.1.116"

    def __init__(self, engine: FakeEngine | None, captures: bool = False) -> None:
        class Logger:
            Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3)

            def __init__(self) -> None:
                pass

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, _: bytes) -> FakeEngine | None:
                if engine is None:
                    self.logger.log(Logger.Severity.ERROR, "Error Code 6: no such\narchitecture")
                return engine

        class Module:
            """A class, because one logger is kept for each module, as the key of a dict."""

            ILogger, TensorIOMode = Logger, SimpleNamespace(INPUT="in")

        self.module: Any = Module()
        self.module.Runtime = Runtime
        if captures:
            self.module.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE=1)

    def load(self) -> Any:
        return self.module

    def __str__(self) -> str:
        return "TensorRT for RTX 1.7.1.116"


class FakeMemory:
    """Host memory for numpy arrays; a capture notes the context's work and replays it.

    As in CUDA, a captured graph does not keep the context whose memory it uses.
    """

    def __init__(self, engine: FakeEngine, returned: Callable[[np.ndarray], Any] = np.copy) -> None:
        self.engine, self.stream, self.log, self.read = engine, id(self), [], returned

    def current(self) -> nullcontext[None]:
        return nullcontext()

    def empty(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return np.full(shape, 77, dtype)

    def pointer(self, buffer: np.ndarray) -> int:
        return buffer.ctypes.data

    def write(self, buffer: np.ndarray, value: Any) -> None:
        np.copyto(buffer, np.asarray(value))

    def capture(self, work: Callable[[int], None]) -> Callable[[], None]:
        work(CAPTURING)
        context, handle = self.engine.contexts[-1], self.engine.handles[-1]
        self.log.append("capture")

        def replay() -> None:
            self.log.append("replay")
            assert handle() is not None, "the graph's context is gone"
            context.run()

        return replay

    def synchronize(self) -> None:
        self.log.append("synchronize")
