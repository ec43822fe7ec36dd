"""How every part of the project captures CUDA graphs.

Importing it does not import torch, because the TensorRT runtime works without it.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import torch

GRAPH_LIMIT = 8
"""How many graphs a `GraphCache` keeps. When it needs room, it drops the graph that is not in use
and was taken longest ago."""

T = TypeVar("T")
K = TypeVar("K")
G = TypeVar("G", bound="CapturedGraph")

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


class Turns:
    """Lets one user at a time use the memory that graphs share, across threads and streams.

    A lock puts the launches in order on the host, and an event puts the launched work in order on
    the device: copies into the inputs of a graph wait for the replay before them. The host does not
    wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        # All captures use one stream: a pool reuses memory only on the stream that it came from.
        self.capture_stream = torch.cuda.Stream(device)
        self.done = torch.cuda.Event()
        # Reentrant: a destructor may release a graph while its thread has a turn.
        self._lock = threading.RLock()
        self._stream = partial(torch.cuda.current_stream, device)

    @contextmanager
    def take(self) -> Iterator[Any]:
        """Yields the caller's current stream, whose further work waits for all earlier turns."""
        with self._lock:
            stream = self._stream()
            stream.wait_event(self.done)
            try:
                yield stream
            finally:
                self.done.record(stream)


class CapturedGraph:
    """One captured piece of work, with its own inputs and results.

    A user takes it from a `GraphCache` until `release`, and is meanwhile its only user unless it is
    shared. A user must launch it, and copy or read its results, within one `Turns.take`.
    """

    graph: torch.cuda.CUDAGraph

    def __init__(self, key: Any, turns: Turns) -> None:
        self.key, self.turns = key, turns
        self.taken = True

    def capture(self, work: Callable[[], T], pool: Any) -> T:
        """Capture ``work`` and return what it returned. Each replay writes into that memory."""
        import torch

        with self.turns.take(), torch.inference_mode():
            self.graph, results = capture_graph(work, self.turns.capture_stream, pool)
        return results

    def release(self) -> None:
        """Let others use the graph. Work that is queued by now, such as copies of the results, runs
        before that of the next user."""
        with self.turns.take():
            self.taken = False

    def __del__(self) -> None:
        # The freed memory can be reused on the capture stream at once, even while a replay still
        # runs on another stream.
        self.turns.done.synchronize()


class GraphCache(Generic[K, G]):
    """At most `GRAPH_LIMIT` graphs by key. A key has several if several are in use at once. Threads
    may share the cache.

    Each graph has its own inputs. All graphs share one memory pool for everything else, which is as
    large as the largest graph needs.

    Args:
        make: (key, turns, pool) → a captured graph; it makes a new pool if pool is None.
        what: key → what the graph computes, for a warning.
    """

    def __init__(
        self,
        device: torch.device,
        make: Callable[[K, Turns, Any], G],
        what: Callable[[K], str],
    ) -> None:
        self.turns = Turns(device)
        self._make, self._what = make, what
        self._graphs: list[G] = []  # ordered by when they were last taken
        # A capture of these keys failed. It is tried again, but no graph is dropped for it again.
        self._refused = set[K]()
        self._lock = threading.Lock()

    def take(self, key: K, alone: bool = True) -> G | None:
        """A graph of ``key`` that only the caller uses, until its `release`. If ``alone`` is False,
        others may use it too; then each use must be a single turn, and no `release` is needed.

        None if all graphs are in use (waiting for one could deadlock, because a user may need two),
        or, with a warning, if there is too little memory for another. The caller must then run the
        work without a graph.

        Raises RuntimeError if a capture fails for another reason than memory.
        """
        with self._lock:
            latest = reversed(self._graphs)  # so that other graphs of the key become the oldest
            graph = next((g for g in latest if g.key == key and not g.taken), None)
            if graph is not None:
                self._graphs.remove(graph)
            elif len(self._graphs) < GRAPH_LIMIT or self._drop_idle(1):
                graph = self._captured(key)
            if graph is not None:
                graph.taken = alone
                self._graphs.append(graph)
            return graph

    def _drop_idle(self, most: int) -> int:
        """Drop up to ``most`` graphs that are not in use, the oldest first; return the number."""
        dropped = [i for i, graph in enumerate(self._graphs) if not graph.taken][:most]
        self._graphs = [graph for i, graph in enumerate(self._graphs) if i not in dropped]
        return len(dropped)

    def _captured(self, key: K) -> G | None:
        from dit_engine.runtime import is_out_of_memory

        while True:
            try:
                # The pool of an existing graph, because torch refuses a pool that has no graph.
                pool = next((graph.graph.pool() for graph in self._graphs), None)
                return self._make(key, self.turns, pool)
            except RuntimeError as error:
                # Ending a failed capture may fail too, and that error hides the first one.
                if not any(map(is_out_of_memory, (error, error.__context__ or error))):
                    raise
            # Not inside the except block, where the traceback keeps tensors alive.
            if key in self._refused or not self._drop_idle(GRAPH_LIMIT):
                break
        if key not in self._refused:
            self._refused.add(key)
            warnings.warn(
                f"too little memory for a CUDA graph of {self._what(key)}: running without one, "
                "which is slower",
                stacklevel=4,
            )
        return None
