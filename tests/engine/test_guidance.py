"""Guidance: which channels, which images, which steps; and what is not computed."""

from __future__ import annotations

import math

import numpy as np
import pytest
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
        self.inputs = x
        return self.output[: len(x)]


def z() -> Tensor:
    return torch.randn(N, C, S, S, generator=torch.Generator().manual_seed(1)).double()


def guide(
    model: Recorder,
    scale: float | list[float] = 4.0,
    channels: int | None = 3,
    guides: np.ndarray | None = None,
) -> Denoise:
    return guided(model, parse_scales(scale, N), channels, guides)


@pytest.mark.parametrize("channels", [1, 3, 4, None])
def test_guided_channels_and_the_rest(channels: int | None) -> None:
    model = Recorder()
    out = guide(model, 2.5, channels)(z(), 0)
    cond, uncond = model.output[:N].numpy(), model.output[N:].numpy()
    count = C if channels is None else channels
    expected = cond.copy()
    for i in range(N):
        for c in range(count):
            expected[i, c] = uncond[i, c] + 2.5 * (cond[i, c] - uncond[i, c])
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-14)
    assert torch.equal(model.inputs, torch.cat([z(), z()]))
    if channels == 3:  # the published three are the default
        assert torch.equal(guided(Recorder(), parse_scales(2.5, N))(z(), 0), out)


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
