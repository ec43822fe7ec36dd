"""Stand-ins on the host for what of TensorRT and CUDA needs a driver: an engine of any function.

The engine reads and writes the addresses that it was given, as the real one does, so that a wrong
address, shape or order of calls gives wrong numbers.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from dit_export.tensorrt.engine_files import EngineFile

Arrays = dict[str, np.ndarray]
CAPTURING = -1  # the stream of a capture, on which work is noted and not done


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.profile = engine, -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.set_tensor_address = self.addresses.__setitem__

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        self.engine.chosen.append(profile)
        return bool(stream)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] in self.engine.profiles[self.profile].batch

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch = next(iter(self.shapes.values()))[0]
        return tuple(batch if n == -1 else n for n in self.engine.get_tensor_shape(name))

    def execute_async_v3(self, stream: int) -> bool:
        if stream != CAPTURING:
            arrays = {name: self._array(name) for name in self.engine.dtypes}
            values = self.engine.function({name: arrays[name] for name in self.engine.inputs})
            for name, value in values.items():
                np.copyto(arrays[name], value)
            self.engine.rows += next(iter(self.shapes.values()))[0]
        return True

    def _array(self, name: str) -> np.ndarray:
        shape, dtype = self.get_tensor_shape(name), np.dtype(self.engine.dtypes[name])
        size = int(np.prod(shape) * dtype.itemsize)
        raw: Any = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(raw, dtype).reshape(shape)


class FakeEngine:
    """inputs, outputs: name → shape, -1 for the batch; dtypes: of what is not float32.

    ``chosen`` are the profiles of the contexts that were made, ``rows`` how many were computed.
    """

    def __init__(
        self,
        file: EngineFile,
        function: Callable[[Arrays], Arrays],
        inputs: dict[str, tuple[int, ...]],
        outputs: dict[str, tuple[int, ...]],
        dtypes: dict[str, str],
    ) -> None:
        self.profiles, self.function, self.inputs = file.key.profiles, function, inputs
        self.num_io_tensors = len(inputs | outputs)
        self.get_tensor_name = list(inputs | outputs).__getitem__
        self.get_tensor_shape = (inputs | outputs).__getitem__
        self.get_tensor_mode = lambda name: "in" if name in inputs else "out"
        self.dtypes = dict.fromkeys(inputs | outputs, "float32") | dtypes
        self.create_runtime_config = SimpleNamespace
        self.config: Any = None
        self.chosen: list[int] = []
        self.rows = 0

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name={"float32": "FLOAT", "int64": "INT64"}[self.dtypes[name]])

    def create_execution_context(self, config: Any = None) -> FakeContext:
        context = FakeContext(self)
        self.config, self.latest = config, weakref.ref(context)
        return context


def fake_flavour(
    engine: FakeEngine | None, captures: bool = False, version: str = "1.7.1.116"
) -> Any:
    """Stands for a `Flavour`; engine: what every file turns into, None if it is refused."""
    module: Any = ModuleType("fake_tensorrt")
    levels = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3)
    module.ILogger = type("ILogger", (), {"Severity": levels})
    module.TensorIOMode = SimpleNamespace(INPUT="in")
    if captures:
        module.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE=1)

    def runtime(logger: Any) -> Any:
        def deserialize(_: bytes) -> FakeEngine | None:
            if engine is None:
                logger.log(levels.ERROR, "Error Code 6: no such\narchitecture")
            return engine

        return SimpleNamespace(deserialize_cuda_engine=deserialize)

    module.Runtime = runtime
    return SimpleNamespace(name="rtx", version=version, load=lambda: module)


class FakeMemory:
    """Host memory for numpy arrays; a capture notes the context's work and replays it.

    As in CUDA, a captured graph does not keep the context whose memory it uses.
    """

    def __init__(self, engine: FakeEngine, read: Callable[[np.ndarray], Any] = np.copy) -> None:
        self.engine, self.stream, self.read, self.current = engine, id(self), read, nullcontext
        self.log: list[str] = []

    def empty(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return np.full(shape, 77, dtype)

    def pointer(self, buffer: np.ndarray) -> int:
        return buffer.ctypes.data

    def write(self, buffer: np.ndarray, value: Any) -> None:
        np.copyto(buffer, np.asarray(value))

    def capture(self, work: Callable[[int], None]) -> Callable[[], None]:
        work(CAPTURING)
        latest = self.engine.latest
        self.log.append("capture")

        def replay() -> None:
            self.log.append("replay")
            context = latest()
            assert context is not None, "the graph's context is gone"
            context.execute_async_v3(0)

        return replay

    def synchronize(self) -> None:
        self.log.append("synchronize")
