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
    one, many = real_number(guidance_scale), sequence(guidance_scale)
    numbers = [one] if many is None else [real_number(each) for each in many]
    flat = (dimensions(guidance_scale) or 0) < 2
    if flat and None in numbers:
        raise ValueError(
            f"guidance_scale {shown(guidance_scale)} is neither a number nor one number per image"
        )
    if not flat or (many is not None and n is not None and len(numbers) != n):
        shape = tuple(getattr(guidance_scale, "shape", (len(numbers),)))
        images = "the images" if n is None else f"{n} images"
        raise ValueError(
            f"guidance_scale of shape {shape} for {images}: give one number, or one per image"
        )
    for number in numbers:
        if number is None or not math.isfinite(number):
            raise ValueError(f"guidance_scale {number} is not a finite number")
        if number < 0:
            raise ValueError(
                f"guidance_scale {number} is negative: 0 and above are allowed, 1 is none"
            )
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


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


def _active_steps(interval: Interval | None, sigmas: np.ndarray | None) -> np.ndarray | None:
    """(steps,) bool: whether step k guides; None for "all"."""
    if interval is None:
        return None
    low, high = parse_interval(interval)
    if sigmas is None:
        raise ValueError("guidance_interval needs the schedule's sigmas")
    return (sigmas > low) & (sigmas <= high)
