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

Function = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
CAPTURING = -1  # the stream of a capture, on which work is noted and not done


class Logger:
    Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3)

    def __init__(self) -> None:
        pass


class FakeContext:
    handle: weakref.ref[Handle]

    def __init__(self, engine: FakeEngine, strategy: int | None) -> None:
        self.engine, self.strategy = engine, strategy
        self.profile, self.executions = -1, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return bool(stream)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] in self.engine.file.key.profiles[self.profile].batch

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch = next(iter(self.shapes.values()))[0]
        free = self.engine.file.outputs.get(name, ())
        return self.shapes.get(name) or tuple(batch if n == -1 else n for n in free)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        if stream != CAPTURING:
            self.run()
        return True

    def run(self) -> None:
        self.executions += 1
        values = self.engine.function({n: self._array(n) for n in self.engine.file.inputs})
        for name in self.engine.file.outputs:
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
    """dtypes: those of inputs that are not float32."""

    def __init__(self, file: EngineFile, function: Function, dtypes: dict[str, str]) -> None:
        self.file, self.function = file, function
        self.names = [*file.inputs, *file.outputs]
        self.num_io_tensors = len(self.names)
        self.get_tensor_name = self.names.__getitem__
        self.dtypes = dict.fromkeys(self.names, "float32") | dtypes
        self.contexts: list[FakeContext] = []

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name={"float32": "FLOAT", "int64": "INT64"}[self.dtypes[name]])

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(cuda_graph_strategy=0)

    def create_execution_context(self, config: Any = None) -> Handle:
        self.contexts.append(FakeContext(self, config and config.cuda_graph_strategy))
        handle = Handle(self.contexts[-1])
        self.contexts[-1].handle = weakref.ref(handle)
        return handle


class FakeFlavour:
    """Stands for a `Flavour`; engines: what each serialised one turns into, None if refused."""

    name, version = "rtx", "1.7.1.116"

    def __init__(self, engines: dict[bytes, FakeEngine | None], captures: bool = False) -> None:
        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, data: bytes) -> FakeEngine | None:
                if engines[data] is None:
                    self.logger.log(Logger.Severity.ERROR, "Error Code 6: no such\narchitecture")
                return engines[data]

        class Module:
            """A class, because one logger is kept for each module, as the key of a dict."""

        self.module = Module()
        self.module.ILogger, self.module.Runtime = Logger, Runtime  # pyright: ignore
        if captures:
            self.module.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE=1)  # pyright: ignore

    def load(self) -> Any:
        return self.module

    def __str__(self) -> str:
        return "TensorRT for RTX 1.7.1.116"


class FakeMemory:
    """Host memory for numpy arrays; a capture notes the context's work and replays it.

    As in CUDA, a captured graph does not keep the context whose memory it uses.
    """

    captures = True

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.stream, self.log = engine, id(self), []

    def current(self) -> nullcontext[None]:
        self.log.append("enter")
        return nullcontext()

    def empty(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return np.full(shape, 77, dtype)

    def pointer(self, buffer: np.ndarray) -> int:
        return buffer.ctypes.data

    def write(self, buffer: np.ndarray, value: Any) -> None:
        np.copyto(buffer, np.asarray(value))

    def read(self, buffer: np.ndarray) -> Any:
        return buffer.copy()

    def capture(self, work: Callable[[int], None]) -> Callable[[], None]:
        work(CAPTURING)
        context = self.engine.contexts[-1]
        self.log.append("capture")

        def replay() -> None:
            self.log.append("replay")
            assert context.handle() is not None, "the graph's context is gone"
            context.run()

        return replay

    def synchronize(self) -> None:
        self.log.append("synchronize")


class FakeTorchMemory(FakeMemory):
    """The same for CPU tensors."""

    def read(self, buffer: np.ndarray) -> Any:
        import torch

        return torch.from_numpy(buffer.copy())
