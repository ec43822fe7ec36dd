"""Samplers against closed forms: data that is normal with mean M and standard deviation SD."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_engine.sampling.samplers import ddim, ddpm, dpm_solver_pp
from dit_engine.sampling.schedule import Schedule, make_schedule, schedule_from_timesteps

M, SD = 0.7, 0.4


def normal_eps(schedule: Schedule) -> Callable[[Tensor, int], Tensor]:
    """The exact epsilon: E[eps | z] for z = √ᾱ·x0 + √(1−ᾱ)·eps."""

    def denoise(z: Tensor, k: int) -> Tensor:
        a = schedule.alphas_cumprod[k]
        return (z - math.sqrt(a) * M) * (math.sqrt(1 - a) / (a * SD**2 + 1 - a))

    return denoise


def no_noise(k: int) -> Tensor:
    raise AssertionError(f"a deterministic sampler asked for the noise of step {k}")


def moments(
    sampler: Any,
    denoise: Any,
    schedule: Schedule,
    prior: tuple[float, float] = (0.0, 1.0),
    **kw: Any,
) -> tuple[float, float]:
    """Exact mean and standard deviation of a sampler whose denoiser is affine in z.

    Row 0 gets no noise anywhere: the mean. Row 1 gets one standard deviation at the start, row
    2 + k one at step k: their distances from row 0 are the weights of independent draws.
    """
    rows = len(schedule) + 2
    z = torch.full((rows, 1, 1, 1), prior[0], dtype=torch.float64)
    z[1] += prior[1]

    def noise(k: int) -> Tensor:
        unit = torch.zeros(rows, 1, 1, 1, dtype=torch.float64)
        unit[2 + k] = 1
        return unit

    out = sampler(denoise, z, schedule, noise, **kw).flatten()
    return out[0].item(), (out[1:] - out[0]).square().sum().sqrt().item()


@pytest.mark.parametrize("steps", [2, 5, 50])
def test_ddpm_with_the_optimal_variance_is_exact_in_any_number_of_steps(steps: int) -> None:
    """Reverse steps of normal data are normal: mean and variance of p(z_prev | z) in closed form.

    The learned variance is given as its place between the two bounds, so this also proves the
    interpolation. The last step returns E[x0 | z], whose spread is a little under SD.
    """
    schedule = make_schedule(steps)
    eps = normal_eps(schedule)

    def denoise(z: Tensor, k: int) -> Tensor:
        a, prev = schedule.alphas_cumprod[k], schedule.alphas_cumprod_prev[k]
        beta = 1 - a / prev
        spread_x0 = SD**2 * (1 - a) / (a * SD**2 + 1 - a)  # Var[x0 | z]
        weight_x0 = math.sqrt(prev) * beta / (1 - a)
        optimal = beta * (1 - prev) / (1 - a) + weight_x0**2 * spread_x0
        low, high = schedule.posterior_log_variance_clipped[k], math.log(beta)
        place = (math.log(optimal) - low) / (high - low)
        return torch.cat([eps(z, k), torch.full_like(z, 2 * place - 1)], dim=1)

    a = schedule.alphas_cumprod[0]
    prior = (math.sqrt(a) * M, math.sqrt(a * SD**2 + 1 - a))
    mean, deviation = moments(ddpm, denoise, schedule, prior)
    a = schedule.alphas_cumprod[-1]
    assert mean == pytest.approx(M, rel=1e-5)
    assert deviation == pytest.approx(SD * math.sqrt(a * SD**2 / (a * SD**2 + 1 - a)), rel=1e-5)


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpm_solver_pp, 2)])
def test_order_of_convergence(sampler: Any, order: int) -> None:
    """Halving the step divides the error by 2^order.

    The exact solution of the probability-flow ODE for normal data keeps the number of standard
    deviations from the mean. Between t = 960 and 160, away from the ends of the schedule, whose
    first-order last step would hide the order.
    """
    t_first, t_last = 960, 160

    def error(stride: int) -> float:
        timesteps = [*range(t_first, t_last - 1, -stride), 0]
        schedule = schedule_from_timesteps(timesteps)
        states: list[Tensor] = []
        z = torch.full((1, 1, 1, 1), 1.5, dtype=torch.float64)
        sampler(normal_eps(schedule), z, schedule, no_noise, lambda k, z: states.append(z))
        spread = np.sqrt(schedule.alphas_cumprod * SD**2 + 1 - schedule.alphas_cumprod)
        centre = np.sqrt(schedule.alphas_cumprod) * M
        last = timesteps.index(t_last)
        exact = centre[last] + spread[last] * (1.5 - centre[0]) / spread[0]
        return abs(states[last - 1].item() - exact)  # the state that step ``last`` starts from

    ratio = error(20) / error(10)
    assert ratio == pytest.approx(2**order, rel=0.25)
