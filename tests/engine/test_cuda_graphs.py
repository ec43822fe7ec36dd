"""Graphs of sampler steps, with torch.cuda's streams, events and graphs played on the CPU."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from played_cuda import Stream, counted_launches, current_stream, events, log, played_cuda
from tiny import tiny_dit
from torch import Tensor

from dit_engine.backends import capture
from dit_engine.backends.capture import GRAPH_LIMIT, capture_graph
from dit_engine.backends.lean.backend import FusedLeanDenoiser, LeanBackend
from dit_engine.backends.lean.cuda_graphs import StepGraph, step_graphs
from dit_engine.engine import Engine
from dit_engine.results import Progress
from dit_engine.sampling.loop import sample_fused

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cuda(request: pytest.FixtureRequest) -> Iterator[None]:
    with played_cuda("steps" in request.fixturenames):
        yield


class Steps:
    """A tiny model's backend twice, with and without graphs, and steps of both to compare, whose
    coefficients make every input matter."""

    def __init__(self) -> None:
        self.plain, self.graphed = (LeanBackend(tiny_dit(), "fp32", CPU) for _ in range(2))
        self.graphs = self.graphed.graphs = step_graphs(self.graphed.transformer)
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
def steps() -> Steps:
    """Its graphs are played; `capture_graph` has a test of its own."""
    return Steps()


def graph_of(fused: FusedLeanDenoiser, guide: bool = True) -> StepGraph:
    graph = fused._graph(guide)
    assert graph is not None
    return graph


def keys(steps: Steps) -> list[tuple[int, bool, int]]:
    return [graph.key for graph in steps.graphs._graphs]


def test_a_replay_computes_the_step_of_its_inputs(steps: Steps) -> None:
    for n, guide in ((1, True), (2, True), (2, False)):
        for step, seed in ((0, 0), (3, 1), (1, 2)):  # other steps, noise, labels, latents
            steps.check(n, step, guide, seed)
    # One for each number of images, guidance, and number of channels, in one pool.
    assert keys(steps) == [(1, True, 3), (2, True, 3), (2, False, 3)]
    assert steps.graphs.take((2, True, 4)) is not None
    assert len({graph.graph.pool() for graph in steps.graphs._graphs}) == 1


@torch.inference_mode()
def test_results_are_passed_on_without_copies_and_arguments_stay(steps: Steps) -> None:
    fused, plain = (steps.fused(backend, 2) for backend in (steps.graphed, steps.plain))
    z, before, noise = steps.inputs(2)
    found, expected = (each.guided_step(z, before, noise, 0, True) for each in (fused, plain))
    graph = graph_of(fused)
    assert found[0] is graph.z and found[1] is graph.x0
    for step in (1, 2):
        with counted_launches() as launches:
            assert fused.guided_step(*found, None, step, True)[0] is graph.z
        # Outside of the graph are only the coefficients, which Triton's kernel would pick inside.
        assert launches.outside == {"copy_": 1} and launches.inside["add_"] == 1
        expected = plain.guided_step(*expected, graph.noise, step, True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.stack([z, before, noise]), steps.inputs(2))


@torch.inference_mode()
def test_latents_after_the_loop_are_in_memory_of_their_own(steps: Steps) -> None:
    fused, draws, guides = steps.fused(steps.graphed, 2), np.zeros(4, bool), np.ones(4, bool)
    z, _, noise = steps.inputs(2)
    own = sample_fused(fused, z, draws, guides, lambda k: noise, lambda k, z: None)
    kept = own.clone()
    fused.guided_step(z, z, None, 0, True)
    assert torch.equal(own, kept) and torch.equal(z, steps.inputs(2)[0])


@torch.inference_mode()
def test_other_steps_than_the_next_and_other_guidance(steps: Steps) -> None:
    """Inputs that are not the results of the graph's last step are copied into the graph."""
    fused, plain = (steps.fused(backend, 2) for backend in (steps.graphed, steps.plain))
    found = expected = tuple(steps.inputs(2)[:2])
    for step, guide in ((0, True), (1, False), (2, True), (3, False), (1, False), (1, True)):
        noise = steps.inputs(2, seed=step)[2]
        found = fused.guided_step(*found, noise, step, guide)
        expected = plain.guided_step(*expected, noise, step, guide)
        assert graph_of(fused, guide).where[0] == step
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert keys(steps) == [(2, True, 3), (2, False, 3)]


@torch.inference_mode()
def test_after_an_interrupt_a_step_copies_its_arguments(steps: Steps) -> None:
    fused, inputs = steps.fused(steps.graphed, 2), steps.inputs(2)
    graph = graph_of(fused)
    fused.guided_step(*inputs, 0, True)

    def interrupted(run: Callable[..., object]) -> Callable[..., None]:
        def run_and_interrupt(*given: Any) -> None:
            run(*given)
            raise KeyboardInterrupt

        return run_and_interrupt

    expected = steps.fused(steps.plain, 2).guided_step(*inputs, 1, True)
    for place, name, step in ((Tensor, "fill_", 3), (graph.graph, "replay", 1)):
        interrupt = patch.object(place, name, interrupted(getattr(place, name)))
        with interrupt, pytest.raises(KeyboardInterrupt):
            fused.guided_step(*inputs, step, True)
        found = fused.guided_step(*inputs, 1, True)
        assert graph.where[0] == 1
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_generation_that_raises_releases_its_graph_and_table(steps: Steps) -> None:
    engine = Engine(tiny_dit(), device="cpu")
    engine._backends["lean", "fp32"] = steps.graphed
    tables = list[Any]()

    def fail(progress: Progress) -> None:
        (graph,) = steps.graphs._graphs
        assert graph.taken
        tables.append(weakref.ref(graph._table))
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more") as kept:  # and with it the loop's variables
        engine.generate([1], steps=3, output="latent", callback=fail)
    (graph,) = steps.graphs._graphs
    assert not graph.taken
    del kept
    gc.collect()
    assert tables[0]() is None


@torch.inference_mode()
def test_copies_wait_for_the_replay_before(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two generations of one size have a graph each, and later use one graph in turn. Their turns
    are in order on any streams."""
    first, second = (steps.fused(steps.graphed, 2, seed) for seed in (0, 5))
    z, other = steps.inputs(2), steps.inputs(2, seed=5)
    graph = graph_of(first)
    assert graph_of(second) is not graph
    second.release()
    events.clear()
    monkeypatch.setattr(Stream, "wait_event", lambda self, _: log("wait", graph.z.clone()))
    first.guided_step(*z, 0, True)
    after = graph.z.clone()
    assert [name for name, _ in events] == ["wait", "replay", "record"]
    first.release()
    assert [name for name, _ in events[3:]] == ["wait", "record"]  # after the reads of the results
    with ThreadPoolExecutor(1) as elsewhere:
        second = steps.fused(steps.graphed, 2, 5)
        steps.graphs._graphs.reverse()  # so that it takes the first one's graph
        elsewhere.submit(second.guided_step, *other, 0, True).result()
    assert graph_of(second) is graph
    waits = [seen for name, seen in events if name == "wait"]
    records = [stream for name, stream in events if name == "record"]
    assert torch.equal(waits[-1], after)  # the other's latents had not been copied yet
    assert records[0] is current_stream() is not records[-1]


@torch.inference_mode()
def test_the_number_of_graphs_is_limited_and_the_oldest_idle_one_is_dropped(steps: Steps) -> None:
    kept = [steps.fused(steps.graphed, 1) for _ in range(GRAPH_LIMIT)]
    graphs = [graph_of(fused) for fused in kept]
    assert len(set(map(id, graphs))) == GRAPH_LIMIT
    steps.check(1)  # all are in use: without a graph
    assert steps.graphs.take((1, True, 3)) is None and len(keys(steps)) == GRAPH_LIMIT
    for fused in (kept[3], kept[1]):
        fused.release()
    dropped = weakref.ref(graphs[1])
    done = steps.graphs.turns.done
    del graphs
    steps.check(2)  # in the place of the second one, which was taken before the fourth
    gc.collect()  # the graph's stand-in refers back to it
    assert dropped() is None and done.synchronised == 1  # its memory is not freed too early
    assert keys(steps) == [(1, True, 3)] * (GRAPH_LIMIT - 1) + [(2, True, 3)]
    del kept[3]  # a generation that ends without a word gives its graph back, too
    del kept[0], fused
    assert sum(not graph.taken for graph in steps.graphs._graphs) == 3


@torch.inference_mode()
def test_too_little_memory_for_a_graph(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle graphs are dropped. If that is not enough, the step runs without a graph."""
    honest, most = capture.capture_graph, 8

    def limited(work: Any, stream: Any, pool: Any = None) -> Any:
        rows = work.__self__.rows
        if rows + sum(graph.rows for graph in steps.graphs._graphs) > most:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:  # as where the capture then cannot be ended, either
                if rows % 4 == 0:
                    raise RuntimeError("operation failed due to a previous error during capture")
        return honest(work, stream, pool)

    monkeypatch.setattr(capture, "capture_graph", limited)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps.check(3)
        steps.check(1)
        steps.check(4)  # in the place of both
        assert keys(steps) == [(4, True, 3)]
    with pytest.warns(UserWarning, match="too little memory for a CUDA graph of a batch of 5"):
        steps.check(5)
    assert keys(steps) == []
    fused = steps.fused(steps.graphed, 2)
    assert graph_of(fused).rows == 4  # a smaller one, later
    fused.release()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps.check(5)  # told once; nor is another graph dropped for it again
        assert keys(steps) == [(2, True, 3)]
        most = 100
        steps.check(5)  # but tried again
        assert keys(steps) == [(2, True, 3), (5, True, 3)]
    most = 8
    fused = steps.fused(steps.graphed, 2)
    graph_of(fused)
    other = steps.fused(steps.graphed, 3)
    with pytest.warns(UserWarning, match="a batch of 3"):
        other.guided_step(*steps.inputs(3), 0, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # and not again in this generation
        other.guided_step(*steps.inputs(3), 1, True)
    assert keys(steps) == [(2, True, 3)]

    def broken(work: Any, stream: Any, pool: Any = None) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(capture, "capture_graph", broken)
    with pytest.raises(RuntimeError, match="something else"):
        steps.check(1)


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_has_workspaces_of_its_own(fails: bool) -> None:
    """They are cleared right before and after it. The first runs, which fill them, come before."""
    stream: Any = Stream()

    def work() -> None:
        log("step")
        assert not (fails and ("begin", None) in events)

    with pytest.raises(AssertionError) if fails else nullcontext():
        capture_graph(work, stream)
    expected = ["step", "step", "clear workspaces", "begin", "step", "end", "clear workspaces"]
    assert [name for name, _ in events] == [name for name in expected if not fails or name != "end"]
    assert gc.isenabled() and stream.waited == [current_stream()]
    assert current_stream().waited[-1] is stream  # also for what a failure left under way
