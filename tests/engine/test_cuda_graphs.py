"""Graphs of sampler steps with torch.cuda's streams, events and graphs played on the CPU."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_dit
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit_bench.peers import graphed
from dit_engine.backends.capture import one_capture
from dit_engine.backends.lean.backend import FusedLeanDenoiser, LeanBackend
from dit_engine.backends.lean.cuda_graphs import GRAPH_LIMIT, StepGraph, StepGraphs
from dit_export.tensorrt.session import TorchMemory
from dit_kernels import dispatch as choose
from dit_kernels.cpu import operators as native
from dit_kernels.cpu import product as native_product

CPU = torch.device("cpu")


class Stream:
    cuda_stream = 7

    def __init__(self, device: object = None) -> None:
        self.device, self.waited = device, list[object]()

    def wait_event(self, event: Event) -> None:
        log(("wait", self))

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


class Event:
    synchronised = 0

    def record(self, stream: Stream) -> None:
        log(("record", stream))

    def synchronize(self) -> None:
        self.synchronised += 1


class Recording(TorchDispatchMode):
    """Every operation on tensors, to be done again on the same memory."""

    def __init__(self, into: list[Any]) -> None:
        super().__init__()
        self.into = into

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.into.append((func, args, kwargs or {}, result))
        return result


class CUDAGraph:
    """Replays what was computed while it was captured, into the memory where it was."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.own_pool: Any = None

    def pool(self) -> Any:
        return self.own_pool

    def replay(self) -> None:
        log(("replay", self))
        time.sleep(0.002)  # so that another thread would come in between
        for func, args, kwargs, before in self.calls:
            after = func(*args, **kwargs)
            for old, new in zip(_tensors(before), _tensors(after), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Capture:
    """torch.cuda.graph."""

    underway = threading.Lock()
    begun: list[dict[str, Any]] = []  # noqa: RUF012

    def __init__(self, graph: CUDAGraph, **options: Any) -> None:
        self.graph, self.mode = graph, Recording(graph.calls)
        self.begun.append(options)
        graph.own_pool = options["pool"] or ("pool of", id(graph))

    def __enter__(self) -> None:
        assert self.underway.acquire(blocking=False), "two captures at once"
        assert not gc.isenabled()
        log(("begin", self.graph))
        time.sleep(0.01)
        self.mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)
        log(("end", self.graph))
        self.underway.release()


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result or () if t is not None]


_log: list[Any] = []
log = _log.append
_local = threading.local()


def current_stream(device: object = None) -> Stream:
    """A thread's own."""
    if not hasattr(_local, "stream"):
        _local.stream = Stream()
    return _local.stream


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Everything of torch.cuda that graphs use; operators that a dispatch mode sees."""
    monkeypatch.setattr(choose, "why_not", lambda *_: "no dispatch mode sees it")
    monkeypatch.setattr(native_product, "why_not", lambda *_: "no dispatch mode sees it")
    monkeypatch.setattr(native, "available", lambda: False)  # of the patch embedding, likewise
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    for name, stand_in in (
        ("Stream", Stream),
        ("Event", Event),
        ("CUDAGraph", CUDAGraph),
        ("graph", Capture),
        ("stream", lambda stream: nullcontext()),
        ("current_stream", current_stream),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    clear = "_cuda_clearCublasWorkspaces"  # not in a torch without CUDA
    monkeypatch.setattr(torch._C, clear, lambda: log(("clear workspaces", None)), raising=False)
    Capture.begun.clear()
    _log.clear()
    yield _log
    _log.clear()


class Steps:
    """A tiny model's backend twice, with and without graphs, and steps of both to compare, whose
    coefficients make every input matter."""

    def __init__(self) -> None:
        self.plain, self.graphed = (LeanBackend(tiny_dit(), "fp32", CPU) for _ in range(2))
        self.graphs = self.graphed.graphs = StepGraphs(self.graphed.transformer)
        self.timesteps = torch.tensor([999, 666, 333, 0])
        self.coefficients = np.random.default_rng(0).random((4, 9))

    def fused(self, backend: LeanBackend, n: int, seed: int = 0) -> FusedLeanDenoiser:
        labels = torch.arange(seed, seed + n) % 10
        labels = torch.cat([labels, torch.full_like(labels, 10)])
        scales = torch.linspace(1, 4, n) if n > 1 else torch.tensor([4.0])
        return backend.fuse(labels, self.timesteps, self.coefficients, scales, 3)

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
def steps() -> Steps:
    return Steps()


def test_a_replay_computes_the_step_of_its_inputs(steps: Steps) -> None:
    for n, guide in ((1, True), (2, True), (2, False)):
        for step, seed in ((0, 0), (3, 1), (1, 2)):  # other steps, noise, labels, latents
            steps.check(n, step, guide, seed)
    assert len(Capture.begun) == 3  # one for each number of images and guidance
    assert steps.graphs.of(2, True, 4).channels == 4  # and for each number of channels


def test_results_are_the_callers_own_and_arguments_stay(steps: Steps) -> None:
    fused = steps.fused(steps.graphed, 2)
    z, before, noise = steps.inputs(2)
    first = fused.guided_step(z, before, noise, 0, True)
    copies = [t.clone() for t in first]
    second = fused.guided_step(*first, noise, 1, True)
    graph = steps.graphs.of(2, True, 3)
    assert all(map(torch.equal, first, copies))  # not overwritten by the second replay
    assert torch.equal(torch.stack([z, before, noise]), steps.inputs(2))
    for result in (*first, *second):
        assert all(result.data_ptr() != own.data_ptr() for own in (*graph.results, graph.z))


def test_the_graph_unused_for_longest_is_dropped(steps: Steps) -> None:
    graphs = steps.graphs
    kept, done = graphs.of(1, False, 3), graphs._turns.done
    for n in (*range(2, GRAPH_LIMIT + 1), 1):
        graphs.of(n, False, 3)
    assert done.synchronised == 0
    graphs.of(GRAPH_LIMIT + 1, False, 3)
    assert list(graphs._graphs) == [(n, False, 3) for n in (*range(3, GRAPH_LIMIT + 1), 1, 9)]
    assert done.synchronised == 1  # its last replay had ended before its memory went
    assert graphs.of(1, False, 3) is kept
    steps.check(2, guide=False)  # captured again


def test_a_failed_capture_leaves_the_others(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    steps.check(1)
    with monkeypatch.context() as patched:
        patched.setattr(StepGraph, "_step", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            steps.graphs.of(2, True, 3)
    assert list(steps.graphs._graphs) == [(1, True, 3)]
    assert current_stream().waited[-1] is steps.graphs._turns.capture_stream
    steps.check(2)
    steps.check(1, step=2)


def test_each_graph_has_workspaces_of_its_own(steps: Steps, cuda: list[Any]) -> None:
    """They are cleared right before and after the capture, which is one turn."""
    first, second = steps.graphs.of(1, True, 3), steps.graphs.of(2, True, 3)
    expected = ["wait", "clear workspaces", "begin", "end", "clear workspaces", "record"]
    assert [name for name, _ in cuda] == expected * 2 and gc.isenabled()
    assert steps.graphs._turns.capture_stream.waited == [current_stream()] * 2
    assert {options["capture_error_mode"] for options in Capture.begun} == {"thread_local"}
    assert [options["pool"] for options in Capture.begun] == [None, first.graph.pool()]
    assert second.graph.pool() == first.graph.pool()


def test_copies_wait_for_the_replay_before(
    steps: Steps, cuda: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, z, other = steps.fused(steps.graphed, 2), steps.inputs(2), steps.inputs(2, seed=5)
    graph = steps.graphs.of(2, True, 3)
    cuda.clear()
    seen: list[Tensor] = []

    def wait(self: Stream, event: Event) -> None:
        seen.append(graph.z.clone())
        cuda.append(("wait", self))

    monkeypatch.setattr(Stream, "wait_event", wait)
    fused.guided_step(*z, 0, True)
    with ThreadPoolExecutor(1) as elsewhere:
        elsewhere.submit(fused.guided_step, *other, 0, True).result()
    assert [name for name, _ in cuda] == ["wait", "replay", "record"] * 2
    streams = [item for name, item in cuda if name != "replay"]
    assert streams[0] is streams[1] is not streams[2] and streams[2] is streams[3]
    assert torch.equal(seen[1], z[0])  # the other's latents had not been copied yet
    assert torch.equal(graph.z, other[0])


def test_threads(steps: Steps) -> None:
    """Captures and replays of several threads at once, of one backend and of another one."""
    many, start = [steps] * 3 + [Steps()], threading.Barrier(4)

    def work(seed: int) -> None:
        start.wait(timeout=60)
        for n in (1, 2) * 3:
            many[seed].check(n, seed=seed)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_one_lock_for_all_captures_of_the_process() -> None:
    captures = {
        "lean": lambda: Steps().graphs.of(1, False, 3),
        "benchmark": lambda: graphed(lambda x: x + 1, torch.ones(2))(),
        "tensorrt": lambda: TorchMemory("cpu").capture(lambda stream: log(("begin", None))),
    }
    with ThreadPoolExecutor(len(captures)) as pool:
        with one_capture():
            waiting = [pool.submit(capture) for capture in captures.values()]
            time.sleep(0.3)
            assert "begin" not in [name for name, _ in _log]
        for task in waiting:
            task.result(timeout=60)
    assert [name for name, _ in _log].count("begin") >= len(captures)
