"""The samplers as they are defined: plain functions from noise to latents, over any denoiser.

Each takes ``denoise(z, k)``, the guided prediction of the model at step k, and does not depend on
how that was computed. Coefficients are computed in float64. ``ddpm`` and ``ddim`` round them to
float32 before they multiply a tensor, as the reference does (facebookresearch/DiT,
``_extract_into_tensor``): without that rounding, a float64 run drifts from the reference's by about
1e-7 per step.

Shape letters: N images, C latent channels, S latent side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dit_engine.sampling.coefficients import LARGEST
from dit_engine.sampling.schedule import Schedule

Denoise = Callable[[Tensor, int], Tensor]
"""(z (N, C, S, S), k) → the prediction, of epsilon unless the diffusion says otherwise,
(N, C, S, S), or the prediction and the variance (N, 2C, S, S)."""
Noise = Callable[[int], Tensor]
"""k → the standard normal draw (N, C, S, S) of step k. It is called only for steps that use one."""
Callback = Callable[[int, Tensor], None]
"""(k, z after step k)."""


def ddpm(
    denoise: Denoise, z: Tensor, schedule: Schedule, noise: Noise, callback: Callback | None = None
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020) with the learned variance of Nichol & Dhariwal 2021.

    For a denoiser without a variance it uses the fixed one, beta (the reference's FIXED_LARGE, its
    choice for ``learn_sigma=False``), unless the diffusion says otherwise. The last step adds no
    noise.

    Args:
        z: (N, C, S, S) the starting noise; not modified.

    Returns:
        (N, C, S, S) latents in z's dtype.
    """
    mean_x0 = _float32(schedule.posterior_mean_coef1)
    mean_z = _float32(schedule.posterior_mean_coef2)
    min_log = _float32(schedule.posterior_log_variance_clipped)
    max_log = _float32(schedule.log_betas)
    for k in range(len(schedule)):
        output, variance = _split(denoise(z, k), z)
        mean = mean_x0[k] * _clipped_x0(output, z, schedule, k) + mean_z[k] * z
        fixed = schedule.fixed_log_variance(learned=variance is not None)
        if k == len(schedule) - 1:
            z = mean
        elif fixed is not None or variance is None:
            assert fixed is not None
            z = mean + math.exp(0.5 * float(np.float32(fixed[k]))) * noise(k).to(z)
        else:
            fraction = (variance + 1) / 2  # -1 … 1 → the lower … the upper bound
            log_variance = fraction * max_log[k] + (1 - fraction) * min_log[k]
            z = mean + torch.exp(0.5 * log_variance) * noise(k).to(z)
        if callback is not None:
            callback(k, z)
    return z


def ddim(
    denoise: Denoise,
    z: Tensor,
    schedule: Schedule,
    noise: Noise,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """Song et al. 2020 (arXiv 2010.02502), equation 12. The model's variance is not used.

    Args:
        z: (N, C, S, S) the starting noise; not modified.
        eta: 0 is deterministic (``noise`` is never called), 1 has DDPM's amount of noise.

    Returns:
        (N, C, S, S) latents in z's dtype.

    Raises:
        ValueError: eta outside 0 … 1.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta {eta!r} is out of range: allowed is 0 to 1")
    # These are float32, as the reference computes them; each operation is correctly rounded.
    now = schedule.alphas_cumprod.astype(np.float32)
    prev = schedule.ddim_alphas_cumprod_prev.astype(np.float32)
    sigmas = np.float32(eta) * np.sqrt((1 - prev) / (1 - now)) * np.sqrt(1 - now / prev)
    directions = np.sqrt(1 - prev - sigmas**2)
    roots = np.sqrt(prev)
    for k in range(len(schedule)):
        output, _ = _split(denoise(z, k), z)
        eps = _predict_epsilon(output, z, schedule, k)
        x0 = _clipped_x0(output, z, schedule, k)  # eps is not clipped, as in diffusers
        step = float(roots[k]) * x0 + float(directions[k]) * eps
        if eta > 0 and k < len(schedule) - 1:
            step = step + float(sigmas[k]) * noise(k).to(z)
        z = step
        if callback is not None:
            callback(k, z)
    return z


def dpm_solver_pp(
    denoise: Denoise, z: Tensor, schedule: Schedule, noise: Noise, callback: Callback | None = None
) -> Tensor:
    """DPM-Solver++(2M), deterministic: Lu et al. 2022 (arXiv 2211.01095), algorithm 2.

    The first step is of first order, because there is no step before it. So is the last one,
    because it goes to zero noise, where λ = log(signal/noise) is infinite: its result is exactly
    the predicted x0.

    Args:
        z: (N, C, S, S) the starting noise; not modified.
        noise: not used.

    Returns:
        (N, C, S, S) latents in z's dtype.
    """
    now = schedule.solver_alphas_cumprod
    signal, signal_prev = np.sqrt(now), np.sqrt(schedule.alphas_cumprod_prev)
    level = np.sqrt(1 - now)
    level_prev = np.sqrt(1 - schedule.alphas_cumprod_prev)
    lambdas = np.log(signal / level)  # half the log signal-to-noise ratio, rising
    x0_before: Tensor | None = None
    for k in range(len(schedule)):
        output, _ = _split(denoise(z, k), z)
        if schedule.diffusion.prediction == "epsilon":
            x0 = (z - float(level[k]) * output) / float(signal[k])
        else:
            x0 = _predict_x0(output, z, schedule, k)
        if k == len(schedule) - 1:
            z = x0
        else:
            h = lambdas[k + 1] - lambdas[k]
            target = x0
            if x0_before is not None:
                ratio = (lambdas[k] - lambdas[k - 1]) / h
                target = x0 + float(0.5 / ratio) * (x0 - x0_before)
            # -expm1(-h) = 1 − e^(−h)
            z = (
                float(level_prev[k] / level[k]) * z
                + float(-signal_prev[k] * np.expm1(-h)) * target
            )  # fmt: skip
        x0_before = x0
        if callback is not None:
            callback(k, z)
    return z


class Sampler(NamedTuple):
    """A sampler, called as ``function(denoise, z, schedule, noise, callback)``, and the number of
    steps and the spacing (of ``make_schedule``) that it is meant to be used with."""

    function: Callable[..., Tensor]
    default_steps: int
    spacing: str


SAMPLERS = {
    "ddpm": Sampler(ddpm, default_steps=250, spacing="official"),
    "ddim": Sampler(ddim, default_steps=50, spacing="official"),
    "dpm++": Sampler(dpm_solver_pp, default_steps=20, spacing="linspace"),
}


def _float32(coefficients: np.ndarray) -> list[float]:
    """Round to float32. Python floats do not change the dtype of the tensor that they multiply."""
    return coefficients.astype(np.float32).tolist()


def _predict_x0(output: Tensor, z: Tensor, schedule: Schedule, k: int) -> Tensor:
    of_z, of_output = _float32(schedule.x0_weights[k])
    return of_z * z + of_output * output  # (N, C, S, S)


def _clipped_x0(output: Tensor, z: Tensor, schedule: Schedule, k: int) -> Tensor:
    x0, clip = _predict_x0(output, z, schedule, k), schedule.diffusion.clip
    return x0 if clip is None else clamped(x0, clip)


def clamped(x0: Tensor, clip: float) -> Tensor:
    """x0 clamped to ±clip, but NaN where |x0| is not below `LARGEST`, so that an overflow does not
    become a picture."""
    return torch.where(x0.abs() < LARGEST, x0.clamp(-clip, clip), torch.nan)


def _predict_epsilon(output: Tensor, z: Tensor, schedule: Schedule, k: int) -> Tensor:
    if schedule.diffusion.prediction == "epsilon":
        return output
    of_z, of_output = _float32(schedule.epsilon_weights[k])
    return of_z * z + of_output * output  # (N, C, S, S)


def _split(output: Tensor, z: Tensor) -> tuple[Tensor, Tensor | None]:
    """The denoiser's output as (prediction, variance or None), each (N, C, S, S) in z's dtype."""
    channels = z.shape[1]
    if output.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"denoiser gave {output.shape[1]} channels for latents of {channels}: "
            f"allowed are {channels} and {2 * channels}"
        )
    output = output.to(z.dtype)  # a half-precision model must not make the trajectory coarse
    return output[:, :channels], output[:, channels:] if output.shape[1] > channels else None
