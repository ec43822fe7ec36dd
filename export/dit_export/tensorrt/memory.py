"""Device memory and a stream for TensorRT sessions, through torch or pycuda."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np

from dit_engine.backends.capture import capture_graph
from dit_export.tensorrt.installed import CudaDevice


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
        """Inside, the device is current in this thread, and its earlier work comes first."""
        with self._torch.cuda.device(self.device):
            self._stream.wait_stream(self._torch.cuda.current_stream(self.device))
            yield

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A buffer that stays where it is."""
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
        """A function that does ``work``, which is given a stream's handle: as a CUDA graph, where
        that can be captured."""
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
