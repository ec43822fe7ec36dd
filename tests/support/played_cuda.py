"""Stand-ins on the CPU for torch.cuda's streams, events and graphs."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from launches import Launches

from dit_engine.backends import capture

events: list[tuple[str, Any]] = []
"""The recorded requests to the device, (name, object), in order."""
_counting: list[Launches] = []
_local = threading.local()


def log(name: str, what: Any = None) -> None:
    events.append((name, what))


class Stream:
    cuda_stream = 7

    def __init__(self, device: object = None) -> None:
        self.device, self.waited = device, list[object]()

    def wait_event(self, event: Event) -> None:
        log("wait", self)

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


class Event:
    synchronised = 0

    def record(self, stream: Stream) -> None:
        log("record", stream)

    def synchronize(self) -> None:
        self.synchronised += 1


class Graph:
    """Runs ``work`` once when it is captured, and again, on the same memory, at each replay."""

    def __init__(self, work: Callable[[], Any], pool: Any) -> None:
        self.work, self.own_pool = work, pool or ("pool of", id(self))
        self.result = work()

    def pool(self) -> Any:
        return self.own_pool

    def replay(self) -> None:
        log("replay")
        with _counting[-1].within_a_graph() if _counting else nullcontext():
            self.work()


def current_stream(device: object = None) -> Stream:
    """The current stream of this thread."""
    if not hasattr(_local, "stream"):
        _local.stream = Stream()
    return _local.stream


@contextmanager
def _captured(graph: Any, **options: Any) -> Iterator[None]:
    """Stands in for torch.cuda.graph."""
    assert not gc.isenabled() and options["capture_error_mode"] == "thread_local"
    log("begin")
    yield
    log("end")


def _capture_graph(
    work: Callable[[], Any], stream: Any, pool: Any = None, warmups: int = 0
) -> tuple[Graph, Any]:
    graph = Graph(work, pool)
    return graph, graph.result


@contextmanager
def played_cuda(graphs: bool = True) -> Iterator[None]:
    """Replaces torch.cuda's classes by those above and, with ``graphs``, also `capture_graph`."""
    events.clear()
    clear = "_cuda_clearCublasWorkspaces"  # not in a torch without CUDA
    with ExitStack() as patches:
        for name, stand_in in (
            ("Stream", Stream), ("Event", Event), ("CUDAGraph", object), ("graph", _captured),
            ("stream", lambda stream: nullcontext()), ("current_stream", current_stream),
        ):  # fmt: skip
            patches.enter_context(patch.object(torch.cuda, name, stand_in))
        cleared = patch.object(torch._C, clear, lambda: log("clear workspaces"), create=True)
        patches.enter_context(cleared)
        if graphs:
            patches.enter_context(patch.object(capture, "capture_graph", _capture_graph))
        yield


@contextmanager
def counted_launches() -> Iterator[Launches]:
    """Counts the launches inside the block, those of replays separately (`Launches.inside`)."""
    with Launches() as launches:
        _counting.append(launches)
        try:
            yield launches
        finally:
            _counting.pop()
