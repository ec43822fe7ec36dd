"""The samplers of `sampler.py` as one affine update a step, for backends that fuse it.

Every sampler's step is x₀ = a·z + b·ε and z′ = c₁·x₀ + c₂·z + c₃·ε + c₄·x₀_before + σ·noise with
coefficients of the schedule alone, so that a single operator (`dit_kernels.guided_step`) does the
guidance and the update for all of them. A clamped x₀ is not affine: it is added afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dit_engine.backends import FusedDenoiser
from dit_engine.sampling.noise import NoiseSource
from dit_engine.sampling.samplers import clamped


def sample_fused(
    denoiser: FusedDenoiser,
    z: Tensor,
    draws: np.ndarray,
    guides: np.ndarray,
    noise: NoiseSource,
    callback: Callable[[int, Tensor], None],
    clip: tuple[float, np.ndarray] | None = None,
) -> Tensor:
    """The sampling loop: z (N, C, S, S) float32, the starting noise → latents of the same shape.

    Args:
        draws, guides: (steps,) bool: which steps add noise, and which are guided.
        clip: of `dit_engine.sampling.coefficients.clipping`.
    """
    z = z.contiguous()  # given latents have any strides
    x0 = torch.zeros_like(z)
    for k in range(len(draws)):
        drawn = noise(k).to(z).contiguous() if draws[k] else x0  # not read where no noise is added
        z, x0 = denoiser.guided_step(z, x0, drawn, k, bool(guides[k]))
        if clip is not None:
            limit, weights = clip
            z = z + float(weights[k]) * clamped(x0, limit)
        callback(k, z)
    return z
