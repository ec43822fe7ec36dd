"""The sampling loop: from noise to latents, one batch at a time.

A backend that fuses takes a whole sampler step at once: every sampler's step is x₀ = a·z + b·ε and
z′ = c₁·x₀ + c₂·z + c₃·ε + c₄·x₀_before + σ·noise with coefficients of the schedule alone, so a
single operator (`dit_kernels.guided_step`) does the guidance and the update of all of them. A
clamped x₀ is not affine: it is added afterwards. Other backends run the reference samplers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dit_engine.backends import Backend, FusedDenoiser
from dit_engine.sampling.coefficients import uses_noise
from dit_engine.sampling.guidance import guided
from dit_engine.sampling.noise import GivenNoise, OfficialNoise, PerImageNoise
from dit_engine.sampling.samplers import SAMPLERS, Callback, Noise, clamped

if TYPE_CHECKING:
    from dit_engine.plan import Plan


def sample(backend: Backend, plan: Plan, device: torch.device, report: Callback) -> Tensor:
    """Noise to latents (N, C, S, S) float32 for all images of ``plan`` as one batch."""
    labels, guides, shape = plan.labels, plan.guides, plan.config.latent_shape
    if plan.noise == "official":
        noise = OfficialNoise(
            plan.seeds[0], len(plan), bool((plan.scales != 1).any()), shape, device
        )
    else:
        noise = PerImageNoise(plan.seeds, shape, device)
    if plan.latents is not None or plan.step_noise is not None:
        noise = GivenNoise(plan.latents, plan.step_noise, noise)
    z = noise.start()  # (N, C, S, S)
    if guides.any():
        labels = labels + [plan.config.null_class] * len(plan)
    conditions = (
        torch.tensor(labels, device=device),
        torch.tensor(plan.schedule.timesteps, device=device),
    )
    channels = plan.guidance_channels or plan.config.in_channels
    fused = backend.fuse(*conditions, plan.coefficients, plan.scales, channels)
    if fused is not None:
        draws = uses_noise(plan.coefficients)
        try:
            return sample_fused(fused, z, draws, guides, noise, report, plan.clip)
        finally:
            fused.release()
    denoise = guided(backend.prepare(*conditions), plan.scales.to(device), channels, guides)
    options = {"eta": plan.eta} if plan.sampler == "ddim" else {}
    return SAMPLERS[plan.sampler].function(denoise, z, plan.schedule, noise, report, **options)


def sample_fused(
    denoiser: FusedDenoiser,
    z: Tensor,
    draws: np.ndarray,
    guides: np.ndarray,
    noise: Noise,
    report: Callback,
    clip: tuple[float, np.ndarray] | None = None,
) -> Tensor:
    """Starting noise z (N, C, S, S) float32 → latents of the same shape, in memory of their own.

    Args:
        draws, guides: (steps,) bool: which steps add noise, and which are guided.
        noise: k → the noise of step k, (N, C, S, S).
        report: called after each step; the next step overwrites the latents that it gets.
        clip: of `dit_engine.sampling.coefficients.clipping`.
    """
    z = z.contiguous()  # latents from the caller may have any strides
    x0 = torch.zeros_like(z)
    for k in range(len(draws)):
        drawn = noise(k).to(z).contiguous() if draws[k] else None
        z, x0 = denoiser.guided_step(z, x0, drawn, k, bool(guides[k]))
        if clip is not None:
            limit, weights = clip
            z = z + float(weights[k]) * clamped(x0, limit)
        report(k, z)
    return z.clone()
