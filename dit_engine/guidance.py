"""Classifier-free guidance (Ho & Salimans 2022): which channels, which images, which steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dit_engine.sampler import Denoise

OFFICIAL_CHANNELS = 3
"""The published code guides latent channels 0 … 2 only (``forward_with_cfg``), and so did the
published FID of 2.27."""

Interval = tuple[float, float]


def guided(
    denoiser: Callable[[Tensor, int], Tensor],
    n: int,
    guidance_scale: float | Sequence[float] | Tensor,
    channels: int | None = OFFICIAL_CHANNELS,
    interval: Interval | None = None,
    sigmas: np.ndarray | None = None,
    in_channels: int = 4,
) -> Denoise:
    """A denoiser of N rows that guides: eps = uncond + scale · (cond − uncond).

    Guidance acts on the first ``channels`` channels; the others, and the variance, are the
    conditional half's own, as in the reference.

    Args:
        denoiser: ``denoiser(x, k)``, x with M rows, uses the first M of its prepared labels. It was
            prepared with 2N labels, [labels, null], or, where no step is guided
            (``guided_steps``), with N.
        n: N.
        guidance_scale: one number, or one for each image. An image at exactly 1.0 is the
            conditional prediction, unguided; if all are, the unconditional half is never computed.
        channels: 1 … in_channels; None means all.
        interval: (low, high): guide only where low < σ ≤ high, σ = √((1−ᾱ)/ᾱ) being the noise
            level (Kynkäänniemi et al. 2024, arXiv 2404.07724); elsewhere the unconditional half
            is not computed. high may be infinite.
        sigmas: (steps,) ``schedule.sigmas``; needed with an interval.
        in_channels: C of the latents.

    Raises:
        ValueError: a scale that is no finite number, a wrong number of scales, channels out of
            range, or an interval that is upside down, negative or NaN.
    """
    scales = parse_scales(guidance_scale, n)
    check_channels(channels, in_channels)
    active = _active_steps(interval, sigmas)
    if (scales == 1).all():
        return denoiser
    unguided = (scales == 1).view(-1, 1, 1, 1)  # (N, 1, 1, 1)
    scales = scales.view(-1, 1, 1, 1)
    guided_channels = in_channels if channels is None else channels

    def denoise(z: Tensor, k: int) -> Tensor:  # (N, C, S, S) → (N, C_out, S, S)
        nonlocal scales, unguided
        if active is not None and not active[k]:
            return denoiser(z, k)
        scales, unguided = scales.to(z), unguided.to(z.device)  # a copy at the first call only
        # In z's dtype: the scaled difference of two half-precision numbers is no place to round.
        output = denoiser(torch.cat([z, z]), k).to(z.dtype)  # (2N, C_out, S, S)
        cond, uncond = output[:n], output[n:]
        eps, eps_uncond = cond[:, :guided_channels], uncond[:, :guided_channels]
        combined = eps_uncond + scales * (eps - eps_uncond)
        # Not uncond + 1·(cond − uncond), whose rounding would show that the batch held others.
        combined = torch.where(unguided, eps, combined)
        return torch.cat([combined, cond[:, guided_channels:]], dim=1)

    return denoise


def guided_steps(
    guidance_scale: float | Sequence[float] | Tensor,
    steps: int,
    interval: Interval | None = None,
    sigmas: np.ndarray | None = None,
) -> np.ndarray:
    """(steps,) bool: the steps at which ``guided`` computes the unconditional half.

    Raises:
        ValueError: see ``guided``.
    """
    active = _active_steps(interval, sigmas)
    guides = bool((parse_scales(guidance_scale) != 1).any())
    return np.full(steps, guides) if active is None else active & guides


def parse_scales(guidance_scale: float | Sequence[float] | Tensor, n: int | None = None) -> Tensor:
    """One scale, or one per image, as a float64 tensor (1,) or (N,).

    Raises:
        ValueError: not finite, negative, or neither 1 nor ``n`` of them.
    """
    try:
        scales = torch.as_tensor(guidance_scale, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"guidance_scale {guidance_scale!r} is neither a number nor one number per image"
        ) from None
    for value in scales.flatten().tolist():
        if not math.isfinite(value):
            raise ValueError(f"guidance_scale {value} is not a finite number")
        if value < 0:
            raise ValueError(
                f"guidance_scale {value} is negative: 0 and above are allowed, 1 is none"
            )
    if scales.ndim > 1 or (scales.ndim == 1 and n is not None and len(scales) != n):
        images = "the images" if n is None else f"{n} images"
        raise ValueError(
            f"guidance_scale of shape {tuple(scales.shape)} for {images}: "
            f"give one number, or one per image"
        )
    return scales.reshape(-1)


def check_channels(channels: int | None, in_channels: int) -> None:
    """Raises ValueError unless channels is None or 1 … in_channels."""
    if channels is None:
        return
    if isinstance(channels, bool) or not isinstance(channels, int):
        raise ValueError(
            f"guidance_channels {channels!r} is not an integer from 1 to {in_channels}"
        )
    if not 1 <= channels <= in_channels:
        raise ValueError(
            f"guidance_channels {channels} is out of range: allowed is 1 to {in_channels}"
        )


def check_interval(interval: Interval) -> None:
    """Raises ValueError unless 0 ≤ low < high."""
    try:
        low, high = (float(bound) for bound in interval)
    except (TypeError, ValueError):
        raise ValueError(f"guidance_interval {interval!r} is not a pair (low, high)") from None
    if math.isnan(low) or math.isnan(high):
        raise ValueError(f"guidance_interval ({low}, {high}) holds a NaN")
    if low < 0 or high < 0:
        raise ValueError(f"guidance_interval ({low}, {high}) is negative: sigma is at least 0")
    if low >= high:
        raise ValueError(
            f"guidance_interval ({low}, {high}) is upside down: low must be below high"
        )


def _active_steps(interval: Interval | None, sigmas: np.ndarray | None) -> np.ndarray | None:
    """(steps,) bool: whether step k guides; None for "all"."""
    if interval is None:
        return None
    check_interval(interval)
    if sigmas is None:
        raise ValueError("guidance_interval needs the schedule's sigmas")
    return (sigmas > interval[0]) & (sigmas <= interval[1])
