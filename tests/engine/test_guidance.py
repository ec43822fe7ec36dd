"""Guidance: which channels, which images, which steps; and what is not computed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_engine
from torch import Tensor

from dit_engine.plan import check_channels, in_interval, parse_scales
from dit_engine.sampling.guidance import guided
from dit_engine.sampling.samplers import Denoise
from dit_engine.sampling.schedule import make_schedule

N, C, S = 3, 4, 2
ENGINE = tiny_engine()


class Recorder:
    """A denoiser whose answer depends on the row's label half, and which counts rows per call."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(0)
        self.output = torch.randn(2 * N, 2 * C, S, S, generator=generator, dtype=torch.float64)
        self.dtype = dtype
        self.rows: list[int] = []

    def __call__(self, x: Tensor, k: int) -> Tensor:
        self.rows.append(len(x))
        self.inputs = x
        return self.output[: len(x)].to(self.dtype)


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
    assert out.shape == (N, 2 * C, S, S)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-14)
    assert torch.equal(model.inputs, torch.cat([z(), z()]))


def test_the_default_is_the_published_three_channels() -> None:
    scales = parse_scales(4.0, N)
    assert torch.equal(guided(Recorder(), scales)(z(), 0), guide(Recorder(), 4.0, 3)(z(), 0))


def test_one_scale_per_image_equals_each_alone() -> None:
    scales = [1.0, 1.5, 4.0]
    together = guide(Recorder(), scales)(z(), 0)
    for i, scale in enumerate(scales):
        assert torch.equal(together[i], guide(Recorder(), scale)(z(), 0)[i])
    # Scale 1 is the conditional prediction to the bit, though its batch was guided.
    assert torch.equal(together[0], Recorder().output[0])


@pytest.mark.parametrize("scale", [1.0, 1, torch.ones(N), [1.0] * N])
def test_scale_one_never_computes_the_unconditional_half(scale: Any) -> None:
    model = Recorder()
    out = guide(model, scale)(z(), 0)
    assert model.rows == [N]
    assert torch.equal(out, model.output[:N])


def test_interval_computes_the_unconditional_half_only_inside() -> None:
    sigmas = make_schedule(10).sigmas
    interval = float(sigmas[6]), float(sigmas[3])  # falling: 6 is excluded, 3 is included
    inside = in_interval(interval, sigmas)
    assert inside.tolist() == [k in (3, 4, 5) for k in range(10)]
    model = Recorder()
    denoise, full = guide(model, guides=inside), guide(Recorder())(z(), 0)
    for k in range(10):
        out = denoise(z(), k)
        assert model.rows[-1] == (2 * N if inside[k] else N)
        assert torch.equal(out, full if inside[k] else model.output[:N])


def test_intervals_of_all_and_of_no_steps() -> None:
    sigmas = make_schedule(10).sigmas
    assert in_interval(None, sigmas).all() and in_interval((0.0, math.inf), sigmas).all()
    assert not in_interval((200.0, 300.0), sigmas).any()


def test_half_precision_predictions_are_combined_in_the_latents_dtype() -> None:
    out = guide(Recorder(torch.bfloat16))(z().float(), 0)
    halves = Recorder(torch.bfloat16).output.to(torch.bfloat16).float()
    expected = halves[N:, :3] + 4.0 * (halves[:N, :3] - halves[N:, :3])
    assert out.dtype == torch.float32
    assert torch.equal(out[:, :3], expected)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (math.nan, r"^guidance_scale nan is not a finite number$"),
        (math.inf, r"^guidance_scale inf is not a finite number$"),
        ([1.0, -math.inf, 2.0], r"^guidance_scale -inf is not a finite number$"),
        ([1.0, 2.0], r"^guidance_scale of shape \(2,\) for 3 images"),
        (torch.ones(3, 1), r"^guidance_scale of shape \(3, 1\) for 3 images"),
        ("4", r"^guidance_scale '4' is neither a number nor one number per image$"),
        (None, r"^guidance_scale None is neither"),
        ([[1.0], [1.0, 2.0]], r"^guidance_scale .* is neither"),
    ],
)
def test_bad_scales(scale: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_scales(scale, N)


@pytest.mark.parametrize("channels", [0, -1, 5, 2.0, "3", True])
def test_bad_channels(channels: Any) -> None:
    with pytest.raises(ValueError, match=r"^guidance_channels .* 1 to 4$"):
        check_channels(channels, 4)
    assert check_channels(5, 5) == 5


@pytest.mark.parametrize(
    ("interval", "message"),
    [
        ((2.0, 1.0), r"^guidance_interval \(2.0, 1.0\) is upside down: low must be below high$"),
        ((1.0, 1.0), r"upside down"),
        ((math.nan, 1.0), r"^guidance_interval \(nan, 1.0\) holds a NaN$"),
        ((0.0, math.nan), r"holds a NaN$"),
        ((-1.0, 1.0), r"^guidance_interval \(-1.0, 1.0\) is negative"),
        ((1.0,), r"^guidance_interval \(1.0,\) is not a pair \(low, high\)$"),
        (3.0, r"^guidance_interval 3.0 is not a pair"),
        (("a", "b"), r"is not a pair"),
    ],
)
def test_bad_intervals_even_at_scale_one(interval: Any, message: str) -> None:
    for scale in (4.0, 1.0):
        with pytest.raises(ValueError, match=message):
            ENGINE.generate([1], guidance_scale=scale, guidance_interval=interval)
