"""Classifier-free guidance (Ho & Salimans 2022): which channels, which images, which steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dit_engine.arguments import dimensions, real_number, sequence, shown, whole_number
from dit_engine.sampling.samplers import Denoise

OFFICIAL_CHANNELS = 3
"""The published code guides latent channels 0 … 2 only (``forward_with_cfg``), and so did the
published FID of 2.27."""

Interval = tuple[float, float]


def guided(
    denoiser: Callable[[Tensor, int], Tensor],
    scales: Tensor,
    channels: int | None = OFFICIAL_CHANNELS,
    guides: np.ndarray | None = None,
) -> Denoise:
    """A denoiser of N rows that guides: eps = uncond + scale · (cond − uncond).

    Guidance acts on the first ``channels`` channels; the others, and the variance, are the
    conditional half's own, as in the reference.

    Args:
        denoiser: ``denoiser(x, k)``, x with M rows, uses the first M of its prepared labels. It was
            prepared with 2N labels, [labels, null], or, where no step is guided, with N.
        scales: (N,) one per image. An image at exactly 1.0 is the conditional prediction, unguided;
            if all are, the unconditional half is never computed.
        channels: 1 … C; None means all.
        guides: (steps,) bool, at which steps the unconditional half is computed; None is at all.
    """
    if (scales == 1).all():
        return denoiser
    n = len(scales)
    unguided = (scales == 1).view(-1, 1, 1, 1)  # (N, 1, 1, 1)
    scales = scales.view(-1, 1, 1, 1)

    def denoise(z: Tensor, k: int) -> Tensor:  # (N, C, S, S) → (N, C_out, S, S)
        nonlocal scales, unguided
        if guides is not None and not guides[k]:
            return denoiser(z, k)
        scales, unguided = scales.to(z), unguided.to(z.device)  # a copy at the first call only
        guided_channels = z.shape[1] if channels is None else channels
        # In z's dtype: the scaled difference of two half-precision numbers is no place to round.
        output = denoiser(torch.cat([z, z]), k).to(z.dtype)  # (2N, C_out, S, S)
        cond, uncond = output[:n], output[n:]
        eps, eps_uncond = cond[:, :guided_channels], uncond[:, :guided_channels]
        combined = eps_uncond + scales * (eps - eps_uncond)
        # Not uncond + 1·(cond − uncond), whose rounding would show that the batch held others.
        combined = torch.where(unguided, eps, combined)
        return torch.cat([combined, cond[:, guided_channels:]], dim=1)

    return denoise


def in_interval(interval: Interval | None, sigmas: np.ndarray) -> np.ndarray:
    """(steps,) bool: at which steps guidance is on, namely where low < σ ≤ high.

    sigmas: (steps,) noise levels σ = √((1−ᾱ)/ᾱ), `Schedule.sigmas` (Kynkäänniemi et al. 2024,
    arXiv 2404.07724). high may be infinite. None is at every step.
    """
    if interval is None:
        return np.ones(len(sigmas), dtype=bool)
    low, high = interval
    return (sigmas > low) & (sigmas <= high)


def parse_scales(guidance_scale: float | Sequence[float] | Tensor, n: int) -> Tensor:
    """One scale, or one per image, as a float64 tensor (N,).

    Raises:
        ValueError: not finite, negative, or neither 1 nor ``n`` of them.
    """
    one, many = real_number(guidance_scale), sequence(guidance_scale)
    numbers = [one] if many is None else [real_number(each) for each in many]
    flat = (dimensions(guidance_scale) or 0) < 2
    if flat and None in numbers:
        raise ValueError(
            f"guidance_scale {shown(guidance_scale)} is neither a number nor one number per image"
        )
    if not flat or (many is not None and len(numbers) != n):
        shape = tuple(getattr(guidance_scale, "shape", (len(numbers),)))
        raise ValueError(
            f"guidance_scale of shape {shape} for {n} images: give one number, or one per image"
        )
    for number in numbers:
        if number is None or not math.isfinite(number):
            raise ValueError(f"guidance_scale {number} is not a finite number")
        if number < 0:
            raise ValueError(
                f"guidance_scale {number} is negative: 0 and above are allowed, 1 is none"
            )
    return torch.tensor(numbers, dtype=torch.float64, device="cpu").expand(n)


def check_channels(channels: int | None, in_channels: int) -> int | None:
    """``channels`` as an int, or None. Raises ValueError unless it is None or 1 … in_channels."""
    if channels is None:
        return None
    number = whole_number(channels)
    if number is None:
        raise ValueError(
            f"guidance_channels {shown(channels)} is not an integer from 1 to {in_channels}"
        )
    if not 1 <= number <= in_channels:
        raise ValueError(
            f"guidance_channels {shown(number)} is out of range: allowed is 1 to {in_channels}"
        )
    return number


def parse_interval(interval: Interval) -> Interval:
    """The two bounds as floats. Raises ValueError unless 0 ≤ low < high."""
    bounds = [real_number(bound) for bound in sequence(interval) or ()]
    low, high = bounds if len(bounds) == 2 else (None, None)
    if low is None or high is None:
        raise ValueError(f"guidance_interval {shown(interval)} is not a pair (low, high)")
    if math.isnan(low) or math.isnan(high):
        raise ValueError(f"guidance_interval ({low}, {high}) holds a NaN")
    if low < 0 or high < 0:
        raise ValueError(f"guidance_interval ({low}, {high}) is negative: sigma is at least 0")
    if low >= high:
        raise ValueError(
            f"guidance_interval ({low}, {high}) is upside down: low must be below high"
        )
    return low, high
