"""Guidance: which channels, which images, which steps; and what is not computed."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dit_engine.plan import in_interval, parse_scales
from dit_engine.sampling.guidance import guided
from dit_engine.sampling.samplers import Denoise
from dit_engine.sampling.schedule import make_schedule

N, C, S = 3, 4, 2


class Recorder:
    """A denoiser whose answer depends on the row's label half, and which counts rows per call."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.output = torch.randn(2 * N, 2 * C, S, S, generator=generator, dtype=torch.float64)
        self.rows = list[int]()

    def __call__(self, x: Tensor, k: int) -> Tensor:
        self.rows.append(len(x))
        return self.output[: len(x)]


def z() -> Tensor:
    return torch.randn(N, C, S, S, generator=torch.Generator().manual_seed(1)).double()


def guide(
    model: Recorder,
    scale: float | list[float] = 4.0,
    guides: np.ndarray | None = None,
) -> Denoise:
    return guided(model, parse_scales(scale, N), guides=guides)


def test_one_scale_per_image_equals_each_alone() -> None:
    scales = [1.0, 1.5, 4.0]
    together = guide(Recorder(), scales)(z(), 0)
    for i, scale in enumerate(scales):
        assert torch.equal(together[i], guide(Recorder(), scale)(z(), 0)[i])
    # Scale 1 is the conditional prediction to the bit, though its batch was guided.
    assert torch.equal(together[0], Recorder().output[0])


def test_the_unconditional_half_is_computed_only_where_it_is_used() -> None:
    sigmas = make_schedule(10).sigmas
    interval = float(sigmas[6]), float(sigmas[3])  # falling: 6 is excluded, 3 is included
    inside = in_interval(interval, sigmas)
    assert inside.tolist() == [k in (3, 4, 5) for k in range(10)]
    assert in_interval(None, sigmas).all() and in_interval((0.0, math.inf), sigmas).all()
    model, unguided = Recorder(), Recorder()
    denoise, full = guide(model, guides=inside), guide(Recorder())(z(), 0)
    for k in range(10):
        out = denoise(z(), k)
        assert model.rows[-1] == (2 * N if inside[k] else N)
        assert torch.equal(out, full if inside[k] else model.output[:N])
    assert torch.equal(guide(unguided, [1.0] * N)(z(), 0), model.output[:N])
    assert unguided.rows == [N]
