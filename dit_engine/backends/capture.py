"""How every part of the project captures CUDA graphs.

Importing it does not import torch, because the TensorRT runtime works without it.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_LOCK = threading.Lock()


@contextmanager
def one_capture() -> Iterator[None]:
    """Hold this during every capture: torch allows one at a time per process.

    Python's garbage collector is off meanwhile: to delete, for example, another engine's graphs, it
    may have to wait for the device, and CUDA breaks off the capture of a thread that waits.
    """
    with _LOCK:
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()


def capture_graph(
    work: Callable[[], T], stream: torch.cuda.Stream, pool: Any = None, warmups: int = 2
) -> tuple[torch.cuda.CUDAGraph, T]:
    """``work`` captured on ``stream``: (the graph, what ``work`` returned).

    Every replay computes into the memory of the tensors that ``work`` returned. What is queued on
    the caller's current stream comes first, and what is queued on it later waits.

    Args:
        pool: the memory pool of other graphs, to be shared; None is a pool of its own.
        warmups: runs before the capture. Libraries choose kernels and load them at first use, which
            must not be captured.
    """
    import torch

    current = torch.cuda.current_stream(stream.device)
    with one_capture():
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                for _ in range(warmups):
                    work()
                graph = torch.cuda.CUDAGraph()
                # "thread_local": other threads may allocate and free memory meanwhile.
                into = torch.cuda.graph(
                    graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                )
                with _own_workspaces(), into:
                    result = work()
        finally:  # the first runs may still be under way when memory did not suffice for the next
            current.wait_stream(stream)
    return graph, result


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """torch keeps a workspace for cuBLAS and cuBLASLt for each stream, and frees all of them
    on request, which Inductor makes around its own graphs. Each graph therefore gets a workspace in
    its own memory, which nothing else uses later, as in
    `torch._inductor.cudagraph_trees.clear_cublas_manager`.
    """
    import torch

    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
