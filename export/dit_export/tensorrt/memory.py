"""Device memory for TensorRT sessions: cuda-core, pycuda or torch, imported when asked for.

Each class is a `dit_export.tensorrt.session.Memory`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from dit_engine.backends.capture import capture_graph, one_capture

MEMORIES = ("cuda-core", "pycuda")


def make_memory(name: str, device: int = 0) -> Any:
    """A new stream with its memory, for numpy arrays.

    Raises ValueError for an unknown name and ImportError, which names the extra.
    """
    if name not in MEMORIES:
        raise ValueError(f"memory {name!r}: choose one of {', '.join(MEMORIES)}")
    return CudaCoreMemory(device) if name == "cuda-core" else PycudaMemory(device)


@dataclass
class Staged:
    """A device buffer with its page-locked twin, which ``array`` shows."""

    array: np.ndarray
    pinned: Any
    device: Any


class CudaCoreMemory:
    """numpy arrays through cuda-core."""

    captures = True

    def __init__(self, device: int = 0) -> None:
        try:
            core: Any = import_module("cuda.core")
        except ImportError as error:
            raise ImportError(
                f"cuda-core cannot be imported ({error}): pip install 'dit-engine[tensorrt]'"
            ) from None
        self.device = core.Device(device)
        self.device.set_current()
        self._stream = self.device.create_stream()
        self._pinned = core.LegacyPinnedMemoryResource()
        self.stream = int(self._stream.handle)

    @contextmanager
    def current(self) -> Iterator[None]:
        self.device.set_current()
        yield

    def empty(self, shape: tuple[int, ...], dtype: str) -> Staged:
        size = max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1)
        pinned = self._pinned.allocate(size)
        raw: Any = (ctypes.c_char * size).from_address(int(pinned.handle))
        count = int(np.prod(shape))
        array = np.frombuffer(raw, np.dtype(dtype), count).reshape(shape)
        return Staged(array, pinned, self.device.allocate(size, stream=self._stream))

    def pointer(self, buffer: Staged) -> int:
        return int(buffer.device.handle)

    def write(self, buffer: Staged, value: np.ndarray) -> None:
        np.copyto(buffer.array, value)
        buffer.device.copy_from(buffer.pinned, stream=self._stream)

    def read(self, buffer: Staged) -> np.ndarray:
        buffer.device.copy_to(buffer.pinned, stream=self._stream)
        self._stream.sync()
        return buffer.array.copy()

    def capture(self, work: Callable[[int], None]) -> Callable[[], None]:
        with one_capture():
            builder = self._stream.create_graph_builder()
            builder.begin_building("thread_local")
            work(int(builder.stream.handle))
            graph = builder.end_building().complete()
        return lambda: graph.launch(self._stream)

    def synchronize(self) -> None:
        self._stream.sync()


class PycudaMemory:
    """numpy arrays through pycuda, which captures no CUDA graphs."""

    captures = False

    def __init__(self, device: int = 0) -> None:
        try:
            cuda: Any = import_module("pycuda.driver")
        except ImportError as error:
            raise ImportError(
                f"pycuda cannot be imported ({error}): pip install 'dit-engine[pycuda]'"
            ) from None
        cuda.init()
        self._cuda = cuda
        self._context = cuda.Device(device).retain_primary_context()
        with self.current():
            self._stream = cuda.Stream()
        self.stream = int(self._stream.handle)

    @contextmanager
    def current(self) -> Iterator[None]:
        self._context.push()
        try:
            yield
        finally:
            self._cuda.Context.pop()

    def empty(self, shape: tuple[int, ...], dtype: str) -> Staged:
        array = self._cuda.pagelocked_empty(shape, np.dtype(dtype))
        return Staged(array, array, self._cuda.mem_alloc(max(array.nbytes, 1)))

    def pointer(self, buffer: Staged) -> int:
        return int(buffer.device)

    def write(self, buffer: Staged, value: np.ndarray) -> None:
        np.copyto(buffer.array, value)
        self._cuda.memcpy_htod_async(buffer.device, buffer.array, self._stream)

    def read(self, buffer: Staged) -> np.ndarray:
        self._cuda.memcpy_dtoh_async(buffer.array, buffer.device, self._stream)
        self._stream.synchronize()
        return buffer.array.copy()

    def capture(self, work: Callable[[int], None]) -> Callable[[], None]:
        raise NotImplementedError("pycuda captures no CUDA graphs")

    def synchronize(self) -> None:
        self._stream.synchronize()


class TorchMemory:
    """torch tensors on their own device, on a stream that waits for the caller's and is waited for.

    What is read belongs to the caller's current stream.
    """

    captures = True

    def __init__(self, device: Any) -> None:
        import torch

        self._torch = torch
        self.device = torch.device(device)
        self._stream = torch.cuda.Stream(self.device)
        self.stream = self._stream.cuda_stream

    @contextmanager
    def current(self) -> Iterator[None]:
        with self._torch.cuda.device(self.device):
            self._stream.wait_stream(self._torch.cuda.current_stream(self.device))
            yield

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        with self._torch.cuda.stream(self._stream):
            return self._torch.empty(shape, dtype=getattr(self._torch, dtype), device=self.device)

    def pointer(self, buffer: Any) -> int:
        return buffer.data_ptr()

    def write(self, buffer: Any, value: Any) -> None:
        with self._torch.cuda.stream(self._stream):
            buffer.copy_(value)

    def read(self, buffer: Any) -> Any:
        # The copy is made where the next run is queued too, so that it comes before that.
        with self._torch.cuda.stream(self._stream):
            copy = buffer.clone()
        current = self._torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        copy.record_stream(current)
        return copy

    def capture(self, work: Callable[[int], None]) -> Callable[[], None]:
        graph, _ = capture_graph(lambda: work(self.stream), self._stream, warmups=0)

        def launch() -> None:
            with self._torch.cuda.stream(self._stream):
                graph.replay()

        return launch

    def synchronize(self) -> None:
        self._stream.synchronize()
