"""Captured decodes, with stand-ins on the CPU for torch.cuda's streams, events and graphs."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from played_cuda import counted_launches, events, played_cuda
from tiny import tiny_vae
from torch import Tensor
from torch.backends import cudnn

from dit_engine.backends import capture
from dit_engine.backends.capture import GRAPH_LIMIT
from dit_engine.backends.lean import vae, vae_layers
from dit_engine.backends.lean.vae import DecoderGraphs, LeanDecoder, convolutions_measured
from dit_kernels import dispatch


class Decodes:
    """The decoder of a tiny VAE, once with graphs and once without."""

    def __init__(self) -> None:
        model = tiny_vae()
        self.plain, self.graphed = (LeanDecoder(model, torch.bfloat16, "cpu") for _ in range(2))
        self.graphs = self.graphed._graphs = DecoderGraphs(self.graphed._network)

    @property
    def keys(self) -> list[tuple[int, ...]]:
        return [graph.key for graph in self.graphs._cache._graphs]

    def check(self, n: int, side: int = 4, seed: int = 0) -> Tensor:
        """Decode with both decoders, compare the images and return them."""
        z = torch.randn(n, 4, side, side, generator=torch.Generator().manual_seed(seed))
        kept, images = z.clone(), self.graphed(z)
        assert torch.equal(images, self.plain(z)) and torch.equal(z, kept)
        return images


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Decodes]:
    for module in (vae, vae_layers):
        monkeypatch.setattr(module, "leaves_sums", lambda device: True)
    monkeypatch.setattr(dispatch, "chosen", lambda *_: "reference")
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with played_cuda():
        yield Decodes()


def test_a_shape_is_captured_at_its_second_decode(decodes: Decodes) -> None:
    decodes.check(2)
    assert decodes.keys == []
    first = decodes.check(2, seed=1)
    copy = first.clone()
    assert decodes.keys == [(2, 4, 4, 4)]
    events.clear()
    z = torch.randn(2, 4, 4, 4)
    with torch.inference_mode(), counted_launches() as launches:
        images = decodes.graphed(z)
    assert launches.outside == {"copy_": 2}  # into the graph's memory and out of it
    assert launches.inside.total() > 20  # the network
    assert [name for name, _ in events] == ["wait", "replay", "record"]
    assert torch.equal(images, decodes.plain(z))
    assert torch.equal(first, copy)  # the caller's own
    decodes.check(2, seed=3)  # outside of inference mode again
    for side in (4, 6, 6):
        decodes.check(1, side)
    assert decodes.keys == [(2, 4, 4, 4), (1, 4, 6, 6)]


def test_shapes_that_occur_once_or_rarely_are_not_captured(decodes: Decodes) -> None:
    decodes.check(1)
    decodes.check(1)
    for _ in range(2):
        for n in range(2, GRAPH_LIMIT + 3):
            decodes.check(n, 2)
    assert decodes.keys == [(1, 4, 4, 4)]
    for n in range(2, GRAPH_LIMIT + 3):
        decodes.check(n, 2)
        decodes.check(n, 2)
    assert decodes.keys == [(n, 4, 2, 2) for n in range(3, GRAPH_LIMIT + 3)]


def test_threads_share_a_decoder(decodes: Decodes) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: decodes.check(1 + i % 2, seed=i), range(16)))
    assert sorted(decodes.keys) == [(1, 4, 4, 4), (2, 4, 4, 4)]  # each captured once
    assert not any(graph.taken for graph in decodes.graphs._cache._graphs)


def test_too_little_memory_for_a_graph(decodes: Decodes, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, attempts = capture.capture_graph, list[None]()

    def limited(work: Any, stream: Any, pool: Any = None) -> Any:
        attempts.append(None)
        if len(decodes.graphs._cache._graphs) >= most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(work, stream, pool)

    monkeypatch.setattr(capture, "capture_graph", limited)
    most = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in (1, 1, 2, 2):  # the second in the place of the first
            decodes.check(n)
    assert decodes.keys == [(2, 4, 4, 4)]
    events.clear()
    decodes.check(2)
    assert ("replay", None) in events
    most = 0
    decodes.check(3)
    with pytest.warns(UserWarning, match=r"for a CUDA graph of a decode of latents \(3, 4, 4, 4\)"):
        decodes.check(3)
    tried = len(attempts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decodes.check(3)
    assert decodes.keys == [] and len(attempts) == tried


def test_cudnn_measures_while_a_decode_is_captured(
    decodes: Decodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a thread that has not decoded before, because torch caches cuDNN's choices per thread."""
    seen, fails = list[tuple[bool, int]](), False
    network = type(decodes.graphed._network)
    honest = network.__call__

    def seeing(self: Any, x: Tensor, pixels: Tensor) -> None:
        seen.append((cudnn.benchmark, threading.get_ident()))
        if fails:
            raise RuntimeError("the capture fails")
        honest(self, x, pixels)

    monkeypatch.setattr(network, "__call__", seeing)
    monkeypatch.setattr(cudnn, "benchmark", False)
    captured = list[tuple[bool, int]]()
    for deterministic in (False, True):
        monkeypatch.setattr(cudnn, "deterministic", deterministic)
        for fails in (False, True):
            z = torch.zeros(1 + fails + 2 * deterministic, 4, 4, 4)
            fails, failing = False, fails
            decodes.graphed(z)
            fails = failing
            with pytest.raises(RuntimeError, match="the capture fails") if fails else nullcontext():
                decodes.graphed(z)
            assert seen[0] == (False, threading.get_ident()) and cudnn.benchmark is False
            captured.append(seen[1])
            seen.clear()
    assert [measures for measures, _ in captured] == [True, True, False, False]
    (thread,) = {thread for _, thread in captured}
    assert thread != threading.get_ident()
    monkeypatch.setattr(cudnn, "deterministic", False)
    torch.use_deterministic_algorithms(True)
    try:
        with convolutions_measured():
            assert cudnn.benchmark is False
    finally:
        torch.use_deterministic_algorithms(False)
