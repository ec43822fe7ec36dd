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
"""How many graphs a `GraphCache` keeps; of those that nobody uses, the one that was taken longest
ago is dropped first."""

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
    """Gives the graphs' common memory to one user at a time, across threads and streams.

    The lock puts the launches in order, and the event puts what they launch in order: on the
    device, the copies into a graph's inputs wait for the replay before them. The host waits for
    nothing.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        # All captures use one stream: a pool reuses memory only on the stream that it came from.
        self.capture_stream = torch.cuda.Stream(device)
        self.done = torch.cuda.Event()
        # A thread may take a turn within its own: a graph may be released by a destructor.
        self._lock = threading.RLock()
        self._stream = partial(torch.cuda.current_stream, device)

    @contextmanager
    def take(self) -> Iterator[Any]:
        """The caller's current stream; what it runs from now on waits for all earlier turns."""
        with self._lock:
            stream = self._stream()
            stream.wait_event(self.done)
            try:
                yield stream
            finally:
                self.done.record(stream)


class CapturedGraph:
    """One piece of work, captured, with inputs and results of its own. A user takes it out of a
    `GraphCache` and has it alone until `release`; what it computes is to be launched, copied and
    read in turns."""

    graph: torch.cuda.CUDAGraph

    def __init__(self, key: Any, turns: Turns) -> None:
        self.key, self.turns = key, turns
        self.taken = True

    def capture(self, work: Callable[[], T], pool: Any) -> T:
        """What ``work`` returned, into whose memory each replay computes."""
        import torch

        with self.turns.take(), torch.inference_mode():
            self.graph, results = capture_graph(work, self.turns.capture_stream, pool)
        return results

    def release(self) -> None:
        """What the user has queued by now, such as copies of the results, comes before all that
        the next user does."""
        with self.turns.take():
            self.taken = False

    def __del__(self) -> None:
        # The memory is free for the stream that it came from, which does not know of a replay that
        # still runs on another stream.
        self.turns.done.synchronize()


class GraphCache(Generic[K, G]):
    """At most `GRAPH_LIMIT` graphs by key, several of one key if several are in use at once.
    Threads may share it.

    Each has inputs of its own. All share one memory pool for what else they allocate, which is as
    large as the largest of them needs.

    Args:
        make: (key, turns, pool) → a captured graph; pool None makes a new pool.
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
        self._graphs: list[G] = []  # the one taken last is the last
        # For these no graphs are dropped again; but they are tried again, as memory may be there.
        self._refused = set[K]()
        self._lock = threading.Lock()

    def take(self, key: K) -> G | None:
        """A graph of ``key`` for the caller alone, until its `release`.

        None if all graphs are in use (to wait for one could be to wait for ever, because a user may
        need two), or if memory does not suffice for another, of which a warning tells. The work is
        then to be run without a graph.
        """
        with self._lock:
            latest = reversed(self._graphs)  # so that others of its key become old
            graph = next((g for g in latest if g.key == key and not g.taken), None)
            if graph is not None:
                self._graphs.remove(graph)
            elif len(self._graphs) < GRAPH_LIMIT or self._drop_idle(1):
                graph = self._captured(key)
            if graph is not None:
                graph.taken = True
                self._graphs.append(graph)
            return graph

    def _drop_idle(self, most: int) -> int:
        """Drop up to ``most`` graphs that nobody uses, and say how many."""
        dropped = [i for i, graph in enumerate(self._graphs) if not graph.taken][:most]
        self._graphs = [graph for i, graph in enumerate(self._graphs) if i not in dropped]
        return len(dropped)

    def _captured(self, key: K) -> G | None:
        from dit_engine.runtime import is_out_of_memory

        while True:
            try:
                # The pool of a living graph: torch refuses one whose graphs are all gone.
                pool = next((graph.graph.pool() for graph in self._graphs), None)
                return self._make(key, self.turns, pool)
            except RuntimeError as error:
                # To end a capture that failed may fail too, and hides the reason.
                if not any(map(is_out_of_memory, (error, error.__context__ or error))):
                    raise
            # Outside of the except block, where the traceback would keep memory.
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
