"""What of TensorRT and CUDA needs a driver, on the host: an engine that runs any function.

The engine reads and writes the addresses that it was given, as the real one does, so that a wrong
address, shape or order of calls gives wrong numbers.
"""

from __future__ import annotations

import ctypes
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from dit_export.tensorrt.engine_files import EngineFile

Function = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


class Severity:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        pass


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.profile = engine, -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.executions = 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert 0 <= profile < len(self.engine.file.key.profiles) and stream
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        held = self.engine.file.key.profiles[self.profile]
        self.shapes[name] = shape
        return shape[0] in held.batch

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        batch = next(iter(self.shapes.values()))[0]
        return tuple(batch if n == -1 else n for n in self.engine.file.outputs[name])

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        if stream == FakeMemory.CAPTURING:
            return True
        self.run()
        return True

    def run(self) -> None:
        self.executions += 1
        values = self.engine.function({n: self._array(n) for n in self.engine.file.inputs})
        for name in self.engine.file.outputs:
            np.copyto(self._array(name), values[name])

    def _array(self, name: str) -> np.ndarray:
        shape = self.get_tensor_shape(name)
        dtype = np.dtype(self.engine.dtypes[name])
        raw: Any = (ctypes.c_char * int(np.prod(shape) * dtype.itemsize)).from_address(
            self.addresses[name]
        )
        return np.frombuffer(raw, dtype).reshape(shape)


class FakeEngine:
    """dtypes: those of inputs that are not float32."""

    def __init__(self, file: EngineFile, function: Function, dtypes: dict[str, str]) -> None:
        self.file, self.function = file, function
        self.names = [*file.inputs, *file.outputs]
        self.dtypes = dict.fromkeys(self.names, "float32") | dtypes
        self.contexts: list[FakeContext] = []

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_name(self, i: int) -> str:
        return self.names[i]

    def get_tensor_dtype(self, name: str) -> Any:
        kinds = {"float32": "FLOAT", "int64": "INT64"}
        return types.SimpleNamespace(name=kinds[self.dtypes[name]])

    def create_runtime_config(self) -> Any:
        return types.SimpleNamespace()

    def create_execution_context(self, *config: Any) -> FakeContext:
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


class FakeRtxEngine(FakeEngine):
    """Captures CUDA graphs by itself where its context is asked to."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.configs: list[Any] = []

    def create_runtime_config(self) -> Any:
        self.configs.append(types.SimpleNamespace(cuda_graph_strategy=0))
        return self.configs[-1]


class FakeFlavour:
    """Stands for a `Flavour`; engines: what each serialised one turns into, None if refused."""

    name, version = "rtx", "1.7.1.116"

    def __init__(self, engines: dict[bytes, FakeEngine | None], rtx: bool = False) -> None:
        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, data: bytes) -> FakeEngine | None:
                if engines[data] is None:
                    self.logger.log(Severity.ERROR, "Error Code 6: no such\narchitecture")
                return engines[data]

        self.module = types.SimpleNamespace(ILogger=ILogger, Runtime=Runtime)
        if rtx:
            self.module.CudaGraphStrategy = types.SimpleNamespace(WHOLE_GRAPH_CAPTURE=1)
        # process_logger keeps one logger a module, and asks it to be hashable.
        self.module = _Module(vars(self.module))

    def load(self) -> Any:
        return self.module

    def __str__(self) -> str:
        return "TensorRT for RTX 1.7.1.116"


class _Module:
    def __init__(self, values: dict[str, Any]) -> None:
        vars(self).update(values)


class FakeMemory:
    """Host memory in numpy; a capture records the context's work and replays it."""

    CAPTURING = -1
    captures = True

    def __init__(self, engines: list[FakeEngine] | None = None) -> None:
        self.stream, self.log = id(self), []
        self.engines = engines or []

    @contextmanager
    def current(self) -> Iterator[None]:
        self.log.append("enter")
        yield

    def empty(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return np.full(shape, 77, dtype)

    def pointer(self, buffer: np.ndarray) -> int:
        return buffer.ctypes.data

    def write(self, buffer: np.ndarray, value: np.ndarray) -> None:
        np.copyto(buffer, value)

    def read(self, buffer: np.ndarray) -> np.ndarray:
        return buffer.copy()

    def capture(self, work: Callable[[int], None]) -> Callable[[], None]:
        work(self.CAPTURING)
        context = self.engines[0].contexts[-1]
        self.log.append("capture")

        def launch() -> None:
            self.log.append("replay")
            context.run()

        return launch

    def synchronize(self) -> None:
        self.log.append("synchronize")


class FakeTorchMemory(FakeMemory):
    """The same on CPU tensors."""

    def write(self, buffer: np.ndarray, value: Any) -> None:
        np.copyto(buffer, value.numpy())

    def read(self, buffer: np.ndarray) -> Any:
        import torch

        return torch.from_numpy(buffer.copy())
