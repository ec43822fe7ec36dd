"""Classifier-free guidance (Ho & Salimans 2022): which channels, which images, which steps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dit_engine.sampling.samplers import Denoise

OFFICIAL_CHANNELS = 3
"""The published code guides latent channels 0 … 2 only (``forward_with_cfg``), and so did the
published FID of 2.27."""


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
        # In z's dtype, because the scale would magnify the rounding errors of half precision.
        output = denoiser(torch.cat([z, z]), k).to(z.dtype)  # (2N, C_out, S, S)
        cond, uncond = output[:n], output[n:]
        eps, eps_uncond = cond[:, :guided_channels], uncond[:, :guided_channels]
        combined = eps_uncond + scales * (eps - eps_uncond)
        # Not uncond + 1·(cond − uncond), which rounds: its bits would depend on the other images.
        combined = torch.where(unguided, eps, combined)
        return torch.cat([combined, cond[:, guided_channels:]], dim=1)

    return denoise
