"""Compares whole generations with the eager backend. The GPU's kernels run in Triton's interpreter,
and stand-ins for CUDA graphs replay the steps."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from numerics import relative_error
from played_cuda import events, played_cuda
from tiny import tiny_dit
from torch import Tensor
from triton_workers import interpreted

from dit_engine.backends import capture
from dit_engine.backends.lean import backend as lean_backend
from dit_engine.backends.lean import conditioning, cuda_graphs, forward
from dit_engine.backends.lean.cuda_graphs import step_graphs
from dit_engine.engine import Engine
from dit_engine.model import DiT
from dit_engine.results import Progress
from dit_engine.sampling.diffusion import Diffusion
from dit_kernels import dispatch

SMALL: dict[str, Any] = {"input_size": 4, "depth": 2, "hidden_size": 32}
CPU = torch.device("cpu")
pytestmark = pytest.mark.slow


@contextmanager
def gpu_engine(model: DiT, precision: str = "fp32") -> Iterator[Engine]:
    """An engine whose "lean" runs in graphs as on a GPU; a table holds two steps of two labels."""
    with ExitStack() as patches:
        for module in (dispatch, forward, cuda_graphs):
            patches.enter_context(patch.object(module, "chosen", lambda *_: "triton"))
        patches.enter_context(played_cuda())
        engine = Engine(model, device="cpu")
        lean = lean_backend.LeanBackend(model, precision, CPU)
        lean.by_label, lean.graphs = False, step_graphs(lean.transformer)
        engine._backends["lean", precision] = lean
        row = lean.conditioning.width * (4 if precision == "fp32" else 2)
        patches.enter_context(patch.object(conditioning, "TABLE_BYTES", 2 * 3 * row))
        yield engine


def latents(engine: Engine, backend: str, **options: Any) -> Tensor:
    common = {"steps": 5, "seed": 4, "guidance_scale": [1.0, 4.0], "output": "latent"}
    return engine.generate([3, 7], backend=backend, **common | options).images


CASES = {
    "three chunks of the table, the last one ragged": {"sampler": "ddpm"},
    "guidance off, on and off again": {"sampler": "ddim", "guidance_interval": (0.5, 10.0)},
    "the x0 before": {"sampler": "dpm++", "guidance_channels": None},
    "no guidance": {"sampler": "ddim", "eta": 0.5, "guidance_scale": 1.0},
}


@pytest.mark.parametrize("reason", CASES)
@interpreted
def test_equals_eager(reason: str) -> None:
    seen: list[Tensor] = []
    with gpu_engine(tiny_dit(**SMALL)) as engine:
        keep = {"callback": lambda progress: seen.append(progress.latents)}
        lean, eager = (latents(engine, b, **CASES[reason], **keep) for b in ("lean", "eager"))
    assert relative_error(lean, eager) < 1e-5
    for own, other in zip(seen[:5], seen[5:], strict=True):  # not overwritten by later steps
        assert relative_error(own, other) < 1e-5
    assert [name for name, _ in events].count("replay") == 5


@interpreted
def test_a_clipped_diffusion() -> None:
    model = tiny_dit(**SMALL, diffusion=Diffusion(clip=0.8))
    with gpu_engine(model) as engine:
        lean, eager = (latents(engine, b, sampler="ddpm", steps=3) for b in ("lean", "eager"))
    assert relative_error(lean, eager) < 1e-5


@interpreted
def test_without_graphs() -> None:
    """As if all graphs were in use."""
    with gpu_engine(tiny_dit(**SMALL)) as engine, patch.object(capture, "GRAPH_LIMIT", 0):
        lean, eager = (latents(engine, b, sampler="ddpm", steps=2) for b in ("lean", "eager"))
    assert relative_error(lean, eager) < 1e-5 and not events


@interpreted
def test_half_precision_is_as_near_to_float32_as_eager() -> None:
    with gpu_engine(tiny_dit(**SMALL), "bf16") as engine:
        options = {"sampler": "ddim", "steps": 3}
        exact = latents(engine, "eager", **options)
        lean, eager = (latents(engine, b, precision="bf16", **options) for b in ("lean", "eager"))
    # Steps add rounding to rounding, in an order of each one's own.
    assert relative_error(lean, exact) < 3 * relative_error(eager, exact)


@interpreted
def test_generations_of_one_size_at_once() -> None:
    """One generation inside another, and several in threads: each has its own graph."""
    with gpu_engine(tiny_dit(**SMALL)) as engine:
        options = {"sampler": "ddpm", "steps": 2}
        expected = [latents(engine, "eager", seed=seed, **options) for seed in range(2)]
        inner: list[Tensor] = []

        def interrupt(progress: Progress) -> None:
            if progress.step == 1:
                inner.append(latents(engine, "lean", seed=1, **options))

        outer = latents(engine, "lean", seed=0, callback=interrupt, **options)
        assert relative_error(outer, expected[0]) < 1e-5
        assert relative_error(inner[0], expected[1]) < 1e-5
        with ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(latents, engine, "lean", seed=i, **options) for i in range(2)]
            for run, wanted in zip(runs, expected, strict=True):
                assert relative_error(run.result(), wanted) < 1e-5
        lean = engine._backends["lean", "fp32"]
        assert isinstance(lean, lean_backend.LeanBackend) and lean.graphs is not None
        graphs = lean.graphs._graphs
        assert {graph.key for graph in graphs} == {(2, True, 3)} and len(graphs) == 2
        assert not any(graph.taken for graph in graphs)
