"""Graphs of sampler steps, with torch.cuda's streams, events and graphs played on the CPU."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_dit
from torch import Tensor

from dit_engine.backends.capture import capture_graph
from dit_engine.backends.lean import cuda_graphs
from dit_engine.backends.lean.backend import FusedLeanDenoiser, LeanBackend
from dit_engine.backends.lean.cuda_graphs import StepGraphs

CPU = torch.device("cpu")
_log: list[tuple[str, Any]] = []
_local = threading.local()


def log(name: str, what: Any = None) -> None:
    _log.append((name, what))


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
    """Replays ``work`` into the memory of its first results."""

    def __init__(self, work: Any, pool: Any) -> None:
        self.work, self.own_pool, self.results = work, pool or ("pool of", id(self)), work()

    def pool(self) -> Any:
        return self.own_pool

    def replay(self) -> None:
        log("replay")
        for old, new in zip(self.results, self.work(), strict=True):
            old.copy_(new)


@contextmanager
def captured(graph: Any, **options: Any) -> Iterator[None]:
    """torch.cuda.graph."""
    assert not gc.isenabled() and options["capture_error_mode"] == "thread_local"
    log("begin")
    yield
    log("end")


def current_stream(device: object = None) -> Stream:
    """A thread's own."""
    if not hasattr(_local, "stream"):
        _local.stream = Stream()
    return _local.stream


@pytest.fixture(autouse=True)
def _cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stand_in in (
        ("Stream", Stream), ("Event", Event), ("CUDAGraph", object), ("graph", captured),
        ("stream", lambda stream: nullcontext()), ("current_stream", current_stream),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    clear = "_cuda_clearCublasWorkspaces"  # not in a torch without CUDA
    monkeypatch.setattr(torch._C, clear, lambda: log("clear workspaces"), raising=False)
    _log.clear()


class Steps:
    """A tiny model's backend twice, with and without graphs, and steps of both to compare, whose
    coefficients make every input matter."""

    def __init__(self) -> None:
        self.plain, self.graphed = (LeanBackend(tiny_dit(), "fp32", CPU) for _ in range(2))
        self.graphs = self.graphed.graphs = StepGraphs(self.graphed.transformer)
        self.coefficients = np.random.default_rng(0).random((4, 9))

    def fused(self, backend: LeanBackend, n: int, seed: int = 0) -> FusedLeanDenoiser:
        labels = torch.arange(seed, seed + n) % 10
        labels = torch.cat([labels, torch.full_like(labels, 10)])
        scales = torch.linspace(1, 4, n) if n > 1 else torch.tensor([4.0])
        timesteps = torch.tensor([999, 666, 333, 0])
        return backend.fuse(labels, timesteps, self.coefficients, scales, 3)

    def inputs(self, n: int, seed: int = 0) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        return torch.randn(3, n, 4, 8, 8, generator=draw)  # z, x0 before, noise

    def check(self, n: int, step: int = 1, guide: bool = True, seed: int = 0) -> None:
        """(z′, x0) of the graph are those of the plain step."""
        with torch.inference_mode():
            found, expected = (
                self.fused(backend, n, seed).guided_step(*self.inputs(n, seed), step, guide)
                for backend in (self.graphed, self.plain)
            )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Its graphs are played; `capture_graph` has a test of its own."""

    def capture(work: Callable[[], Any], stream: Any, pool: Any = None) -> tuple[Graph, Any]:
        graph = Graph(work, pool)
        return graph, graph.results

    monkeypatch.setattr(cuda_graphs, "capture_graph", capture)
    return Steps()


def test_a_replay_computes_the_step_of_its_inputs(steps: Steps) -> None:
    for n, guide in ((1, True), (2, True), (2, False)):
        for step, seed in ((0, 0), (3, 1), (1, 2)):  # other steps, noise, labels, latents
            steps.check(n, step, guide, seed)
    assert steps.graphs.of(2, True, 4).channels == 4
    # One for each number of images, guidance, and number of channels.
    made = list(steps.graphs._graphs)
    assert made == [(1, True, 3), (2, True, 3), (2, False, 3), (2, True, 4)]
    assert len({graph.graph.pool() for graph in steps.graphs._graphs.values()}) == 1


def test_results_are_the_callers_own_and_arguments_stay(steps: Steps) -> None:
    fused = steps.fused(steps.graphed, 2)
    z, before, noise = steps.inputs(2)
    first = fused.guided_step(z, before, noise, 0, True)
    copies = [t.clone() for t in first]
    fused.guided_step(*first, noise, 1, True)
    assert all(map(torch.equal, first, copies))  # not overwritten by the second replay
    assert torch.equal(torch.stack([z, before, noise]), steps.inputs(2))


def test_copies_wait_for_the_replay_before(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, z, other = steps.fused(steps.graphed, 2), steps.inputs(2), steps.inputs(2, seed=5)
    graph = steps.graphs.of(2, True, 3)
    _log.clear()
    monkeypatch.setattr(Stream, "wait_event", lambda self, _: log("wait", graph.z.clone()))
    fused.guided_step(*z, 0, True)
    with ThreadPoolExecutor(1) as elsewhere:
        elsewhere.submit(fused.guided_step, *other, 0, True).result()
    assert [name for name, _ in _log] == ["wait", "replay", "record"] * 2
    assert _log[2][1] is current_stream() is not _log[5][1]
    assert torch.equal(_log[3][1], z[0])  # the other's latents had not been copied yet
    assert torch.equal(graph.z, other[0])


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_has_workspaces_of_its_own(fails: bool) -> None:
    """They are cleared right before and after it. The first runs, which fill them, come before."""
    stream: Any = Stream()

    def work() -> None:
        log("step")
        assert not (fails and ("begin", None) in _log)

    with pytest.raises(AssertionError) if fails else nullcontext():
        capture_graph(work, stream)
    expected = ["step", "step", "clear workspaces", "begin", "step", "end", "clear workspaces"]
    assert [name for name, _ in _log] == [name for name in expected if not fails or name != "end"]
    assert gc.isenabled() and stream.waited == [current_stream()]
    assert current_stream().waited[-1] is stream  # also for what a failure left under way
