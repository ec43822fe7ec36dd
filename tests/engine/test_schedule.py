"""Betas, respacing and spacings against published values and diffusers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from dit_engine.sampling.diffusion import PUBLISHED_DIFFUSION, Diffusion
from dit_engine.sampling.schedule import (
    SPACINGS,
    make_schedule,
    schedule_from_timesteps,
    space_timesteps,
)


def test_the_full_schedule_is_the_linear_one() -> None:
    schedule = make_schedule(1000)
    assert schedule.timesteps.tolist() == list(range(999, -1, -1))
    product = 1.0
    for t in range(1000):
        beta = 1e-4 + (2e-2 - 1e-4) * t / 999
        product *= 1 - beta
        k = 999 - t
        assert schedule.betas[k] == pytest.approx(beta, rel=1e-9)  # 1 − ratio cancels
        assert schedule.alphas_cumprod[k] == pytest.approx(product, rel=1e-12)
    assert schedule.sigmas[0] == pytest.approx(157.4, abs=0.05)
    assert schedule.sigmas[-1] == pytest.approx(math.sqrt(1e-4 / (1 - 1e-4)), rel=1e-9)
    assert (np.diff(schedule.sigmas) < 0).all()


def test_official_respacing_by_known_values() -> None:
    assert make_schedule(250).timesteps[::-1][:4].tolist() == [0, 4, 8, 12]
    assert make_schedule(250).timesteps[:2].tolist() == [999, 995]
    assert make_schedule(50).timesteps[::-1][:5].tolist() == [0, 20, 41, 61, 82]
    assert make_schedule(10).timesteps.tolist() == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert make_schedule(2).timesteps.tolist() == [999, 0]
    assert make_schedule(1).timesteps.tolist() == [0]


@pytest.mark.parametrize("steps", [21, 77, 250, 997])
def test_official_respacing_accumulates_its_stride(steps: int) -> None:
    """The sums round differently from products: of 21 steps the middle one is 499, not 500."""
    strides = [999 / (steps - 1)] * (steps - 1)
    positions = itertools.accumulate(strides, initial=0.0)
    assert make_schedule(steps).timesteps[::-1].tolist() == [round(p) for p in positions]
    assert make_schedule(21).timesteps[10] == 499


@pytest.mark.parametrize(
    ("steps", "spacing", "first", "last"),
    [
        (50, "ddim", 980, 0), (250, "ddim", 996, 0), (1, "ddim", 0, 0), (2, "ddim", 500, 0),
        (50, "leading", 980, 0), (30, "leading", 957, 0), (1, "leading", 0, 0),
        (20, "linspace", 999, 50), (1, "linspace", 999, 999), (1000, "linspace", 999, 0),
        (50, "trailing", 999, 19), (1, "trailing", 999, 999), (4, "trailing", 999, 249),
    ],
)  # fmt: skip
def test_other_spacings_by_known_values(steps: int, spacing: str, first: int, last: int) -> None:
    timesteps = space_timesteps(steps, spacing)
    assert len(timesteps) == steps
    assert (timesteps[0], timesteps[-1]) == (first, last)


def test_every_number_of_steps_can_be_made() -> None:
    for spacing in SPACINGS:
        made = 0
        for steps in range(1, 1001):
            try:
                timesteps = space_timesteps(steps, spacing)
            except ValueError:
                assert spacing in ("ddim", "trailing")
                continue
            made += 1
            assert timesteps.dtype == np.int64
            assert len(timesteps) == steps
            assert timesteps.max() <= 999
            assert timesteps.min() >= 0
            assert (np.diff(timesteps) < 0).all()
        counts = {"ddim": len({math.ceil(1000 / s) for s in range(1, 1001)}), "trailing": 938}
        assert made == counts.get(spacing, 1000)


def test_ddim_spacing_takes_the_smallest_stride() -> None:
    for steps in (2, 10, 25, 50, 100, 250, 500, 1000):
        stride = next(i for i in range(1, 1001) if len(range(0, 1000, i)) == steps)
        expected = list(range(0, 1000, stride))[::-1]
        assert space_timesteps(steps, "ddim").tolist() == expected


def test_respaced_coefficients_follow_from_the_alphas() -> None:
    """Each array against the formula of Ho et al. 2020, evaluated from the full ᾱ."""
    schedule = make_schedule(25)
    full = PUBLISHED_DIFFUSION.alphas_cumprod
    for k, t in enumerate(schedule.timesteps):
        now, prev = full[t], full[schedule.timesteps[k + 1]] if k < 24 else 1.0
        beta = 1 - now / prev
        posterior = beta * (1 - prev) / (1 - now)
        assert schedule.alphas_cumprod[k] == pytest.approx(now, rel=1e-12)
        assert schedule.alphas_cumprod_prev[k] == pytest.approx(prev, rel=1e-12)
        assert schedule.betas[k] == pytest.approx(beta, rel=1e-9)
        assert schedule.posterior_mean_coef1[k] == pytest.approx(
            math.sqrt(prev) * beta / (1 - now), rel=1e-9
        )
        assert schedule.posterior_mean_coef2[k] == pytest.approx(
            math.sqrt(1 - beta) * (1 - prev) / (1 - now), rel=1e-9
        )
        if k < 24:
            assert schedule.posterior_log_variance_clipped[k] == pytest.approx(math.log(posterior))
    clipped = schedule.posterior_log_variance_clipped
    assert clipped[-1] == clipped[-2]
    assert schedule.alphas_cumprod_prev[-1] == 1.0


@pytest.mark.parametrize("n", [1000, 777, 100])
@pytest.mark.parametrize(
    ("kind", "theirs", "ours"),
    [
        ("DDIMScheduler", "leading", "leading"),
        ("DDIMScheduler", "linspace", "even"),
        ("DDIMScheduler", "trailing", "trailing"),
        ("DDPMScheduler", "leading", "leading"),
        ("DDPMScheduler", "linspace", "even"),
        ("DDPMScheduler", "trailing", "trailing"),
        ("DPMSolverMultistepScheduler", "leading", "solver-leading"),
        ("DPMSolverMultistepScheduler", "linspace", "linspace"),
        ("DPMSolverMultistepScheduler", "trailing", "trailing"),
    ],
)
def test_every_number_of_steps_is_diffusers(kind: str, theirs: str, ours: str, n: int) -> None:
    """Or it is refused, where theirs has a time step -1. The solver's n steps repeat one."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, kind)(num_train_timesteps=n, timestep_spacing=theirs)
    diffusion = Diffusion(num_train_steps=n)
    for steps in range(1, n + (ours not in ("linspace", "solver-leading"))):
        scheduler.set_timesteps(steps)
        expected = scheduler.timesteps.tolist()
        if -1 in expected:
            with pytest.raises(ValueError, match=rf"^steps {steps}: .* makes {len(expected)} of"):
                space_timesteps(steps, ours, diffusion)
        else:
            assert space_timesteps(steps, ours, diffusion).tolist() == expected, steps


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, "50", True, None, float("nan")])
def test_bad_steps(steps: object) -> None:
    with pytest.raises(ValueError, match=r"^steps .* 1 to 1000$"):
        make_schedule(steps)


def test_bad_spacing_and_timesteps() -> None:
    with pytest.raises(ValueError, match=r"^spacing 'karras' is unknown; choose one of official"):
        make_schedule(10, "karras")
    with pytest.raises(ValueError, match=r"^steps 300 has no integer stride .* 250 and 334$"):
        make_schedule(300, "ddim")
    with pytest.raises(ValueError, match=r"at least one time step$"):
        schedule_from_timesteps([])
    with pytest.raises(ValueError, match=r"from 0 to 1000: allowed is 0 … 999$"):
        schedule_from_timesteps([1000, 0])
    with pytest.raises(ValueError, match=r"do not fall strictly$"):
        schedule_from_timesteps([5, 5])
