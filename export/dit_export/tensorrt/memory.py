"""Device memory for TensorRT sessions through cuda-core, pycuda or torch, imported when used."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from dit_engine.arguments import choice
from dit_engine.backends.capture import capture_graph, one_capture

MEMORIES = ("cuda-core", "pycuda")


class Memory:
    """Device memory on one stream. The caller's arrays are torch tensors or numpy arrays."""

    stream: int  # the CUDA stream's handle
    captures = True  # whether `capture` works

    def current(self) -> AbstractContextManager[None]:
        """Inside, the device is current in this thread, and its earlier work comes first."""
        raise NotImplementedError

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A buffer that stays where it is."""
        raise NotImplementedError

    def pointer(self, buffer: Any) -> int:
        raise NotImplementedError

    def write(self, buffer: Any, value: Any) -> None:
        """Copy the caller's array into a buffer of its shape."""
        raise NotImplementedError

    def read(self, buffer: Any) -> Any:
        """A buffer's contents as a new array of the caller's."""
        raise NotImplementedError

    def capture(self, work: Callable[[int], None]) -> Callable[[], None]:
        """``work``, given a stream's handle, as a CUDA graph; calling the result launches it."""
        raise NotImplementedError

    def synchronize(self) -> None:
        raise NotImplementedError


def make_memory(name: str, device: int = 0) -> Memory:
    """A new stream with its memory, for numpy arrays.

    Raises ValueError for an unknown name and ImportError, which names the extra.
    """
    kind = CudaCoreMemory if choice("memory", name, MEMORIES) == "cuda-core" else PycudaMemory
    return kind(device)


@dataclass
class Staged:
    """A device buffer with page-locked host memory, which ``array`` shows; up and down copy."""

    array: np.ndarray
    pointer: int
    up: Callable[[], Any]
    down: Callable[[], Any]


class NumpyMemory(Memory):
    def __init__(self, module: str, package: str, extra: str) -> None:
        try:
            self.cuda: Any = import_module(module)
        except ImportError as error:
            raise ImportError(
                f"{package} cannot be imported ({error}): pip install 'dit-engine[{extra}]'"
            ) from None

    def pointer(self, buffer: Staged) -> int:
        return buffer.pointer

    def write(self, buffer: Staged, value: np.ndarray) -> None:
        np.copyto(buffer.array, value)
        buffer.up()

    def read(self, buffer: Staged) -> np.ndarray:
        buffer.down()
        self.synchronize()
        return buffer.array.copy()


class CudaCoreMemory(NumpyMemory):
    def __init__(self, device: int = 0) -> None:
        super().__init__("cuda.core", "cuda-core", "tensorrt")
        self.device = self.cuda.Device(device)
        self.device.set_current()
        self._stream = self.device.create_stream()
        self._pinned = self.cuda.LegacyPinnedMemoryResource()
        self.stream = int(self._stream.handle)

    @contextmanager
    def current(self) -> Iterator[None]:
        self.device.set_current()
        yield

    def empty(self, shape: tuple[int, ...], dtype: str) -> Staged:
        count = int(np.prod(shape))
        size = max(count * np.dtype(dtype).itemsize, 1)
        pinned = self._pinned.allocate(size)
        raw: Any = (ctypes.c_char * size).from_address(int(pinned.handle))
        array = np.frombuffer(raw, np.dtype(dtype), count).reshape(shape)
        buffer = self.device.allocate(size, stream=self._stream)
        up = partial(buffer.copy_from, pinned, stream=self._stream)
        down = partial(buffer.copy_to, pinned, stream=self._stream)
        return Staged(array, int(buffer.handle), up, down)

    def capture(self, work: Callable[[int], None]) -> Callable[[], None]:
        with one_capture():
            builder = self._stream.create_graph_builder()
            builder.begin_building("thread_local")
            work(int(builder.stream.handle))
            graph = builder.end_building().complete()
        return lambda: graph.launch(self._stream)

    def synchronize(self) -> None:
        self._stream.sync()


class PycudaMemory(NumpyMemory):
    captures = False

    def __init__(self, device: int = 0) -> None:
        super().__init__("pycuda.driver", "pycuda", "pycuda")
        self.cuda.init()
        self._context = self.cuda.Device(device).retain_primary_context()
        with self.current():
            self._stream = self.cuda.Stream()
        self.stream = int(self._stream.handle)

    @contextmanager
    def current(self) -> Iterator[None]:
        self._context.push()
        try:
            yield
        finally:
            self.cuda.Context.pop()

    def empty(self, shape: tuple[int, ...], dtype: str) -> Staged:
        array = self.cuda.pagelocked_empty(shape, np.dtype(dtype))
        buffer = self.cuda.mem_alloc(max(array.nbytes, 1))
        up = partial(self.cuda.memcpy_htod_async, buffer, array, self._stream)
        down = partial(self.cuda.memcpy_dtoh_async, array, buffer, self._stream)
        return Staged(array, int(buffer), up, down)

    def synchronize(self) -> None:
        self._stream.synchronize()


class TorchMemory(Memory):
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
        # Copied on the stream on which the next run is queued too, so that the copy comes first.
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
