"""Betas, respacing and spacings against published values and diffusers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from dit_engine.sampling.diffusion import Diffusion
from dit_engine.sampling.schedule import make_schedule, schedule_from_timesteps, space_timesteps


def test_the_full_schedule_is_the_linear_one() -> None:
    schedule = make_schedule(1000)
    assert schedule.timesteps.tolist() == list(range(999, -1, -1))
    betas = np.array([1e-4 + (2e-2 - 1e-4) * t / 999 for t in range(999, -1, -1)])
    assert schedule.betas == pytest.approx(betas, rel=1e-9)  # 1 − ratio cancels
    assert schedule.alphas_cumprod[::-1] == pytest.approx(np.cumprod(1 - betas[::-1]), rel=1e-12)
    assert schedule.sigmas[0] == pytest.approx(157.4, abs=0.05)
    assert schedule.sigmas[-1] == pytest.approx(math.sqrt(1e-4 / (1 - 1e-4)), rel=1e-9)


@pytest.mark.parametrize("steps", [2, 10, 21, 50, 77, 250, 997])
def test_official_respacing_accumulates_its_stride(steps: int) -> None:
    """The sums round differently from products: of 21 steps the middle one is 499, not 500."""
    strides = [999 / (steps - 1)] * (steps - 1)
    positions = itertools.accumulate(strides, initial=0.0)
    assert make_schedule(steps).timesteps[::-1].tolist() == [round(p) for p in positions]
    assert make_schedule(21).timesteps[10] == 499
    assert make_schedule(1).timesteps.tolist() == [0]


def test_ddim_spacing_takes_the_smallest_stride_that_makes_so_many_steps() -> None:
    smallest = {len(range(0, 1000, stride)): stride for stride in range(1000, 0, -1)}
    for steps in range(1, 1001):
        if steps in smallest:
            expected = list(range(0, 1000, smallest[steps]))[::-1]
            assert space_timesteps(steps, "ddim").tolist() == expected
        else:
            with pytest.raises(ValueError, match=f"^steps {steps} has no integer stride"):
                space_timesteps(steps, "ddim")


@pytest.mark.parametrize("n", [1000, 77])
@pytest.mark.parametrize(
    ("kind", "theirs", "ours"),
    [
        ("DDIMScheduler", "leading", "leading"),
        ("DDIMScheduler", "linspace", "even"),
        ("DDIMScheduler", "trailing", "trailing"),
        ("DPMSolverMultistepScheduler", "leading", "solver-leading"),
        ("DPMSolverMultistepScheduler", "linspace", "linspace"),
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


def test_bad_spacing_and_timesteps() -> None:
    with pytest.raises(ValueError, match=r"^spacing 'karras': choose one of official"):
        make_schedule(10, "karras")
    for bad in ([], [1000, 0], [5, 5]):
        with pytest.raises(ValueError, match=r"from 999 to 0, strictly falling$"):
            schedule_from_timesteps(bad)
