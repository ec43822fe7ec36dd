"""Unpatchify, guidance, learned variance and the sampler's update, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.triton.launch import launch

_BLOCK = 256  # latents are few (4,096 per image at 256 px): many small programs


@triton.jit
def _guided_step_kernel(
    tokens,  # (M, T, p·p·OUTPUTS) contiguous
    z,  # (N, C, S, S) float32 contiguous, as are x0_before, noise, z_next and x0
    x0_before,
    noise,
    guidance_scale,  # (N,) float32
    coefficients,  # (9,) float32
    z_next,
    x0,
    images,  # N
    C: tl.constexpr,
    OUTPUTS: tl.constexpr,  # channels of the model: C, or 2C with a learned variance
    S: tl.constexpr,
    P: tl.constexpr,
    GUIDED: tl.constexpr,  # guided channels; 0 where M = N
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # programs per image
):
    program = tl.program_id(0)
    image = (program // BLOCKS).to(tl.int64)
    index = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)  # within the image
    mask = index < C * S * S
    channel = index // (S * S)
    row = index // S % S
    column = index % S
    patch = row // P * (S // P) + column // P
    offset = ((patch * P + row % P) * P + column % P) * OUTPUTS + channel
    conditional = tokens + image * (S * S * OUTPUTS)
    eps = tl.load(conditional + offset, mask=mask, other=0.0).to(tl.float32)
    if GUIDED > 0:
        unconditional = tokens + (image + images) * (S * S * OUTPUTS)
        guided = mask & (channel < GUIDED)
        base = tl.load(unconditional + offset, mask=guided, other=0.0).to(tl.float32)
        scale = tl.load(guidance_scale + image)
        blend = tl.where(scale == 1, eps, base + scale * (eps - base))
        eps = tl.where(guided, blend, eps)

    index += image * (C * S * S)
    now = tl.load(z + index, mask=mask, other=0.0)
    clean = tl.load(coefficients) * now + tl.load(coefficients + 1) * eps
    mean = tl.load(coefficients + 2) * clean + tl.load(coefficients + 3) * now
    before = tl.load(x0_before + index, mask=mask, other=0.0)
    mean += tl.load(coefficients + 4) * eps + tl.load(coefficients + 5) * before
    std = tl.load(coefficients + 8)
    draw = tl.load(noise + index, mask=mask, other=0.0)
    if OUTPUTS == 2 * C:
        variance = tl.load(conditional + offset + C, mask=mask, other=0.0).to(tl.float32)
        low = tl.load(coefficients + 6)
        high = tl.load(coefficients + 7)
        std = std * tl.exp(0.5 * (low + (variance + 1) / 2 * (high - low)))
    tl.store(x0 + index, clean, mask=mask)
    tl.store(z_next + index, tl.where(std == 0, mean, mean + std * draw), mask=mask)


def guided_step(
    tokens: Tensor,
    z: Tensor,
    x0_before: Tensor,
    noise: Tensor,
    guidance_scale: Tensor,
    coefficients: Tensor,
    guided_channels: int,
    patch_size: int,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """tokens (M, T, p·p·C_out), latents (N, C, S, S) float32 → (z_next, x0).

    ``out`` may be (z, x0_before): every latent is read before it is written.
    """
    z_next, x0 = (torch.empty_like(z), torch.empty_like(z)) if out is None else out
    n, channels, side, _ = z.shape
    if z.numel() == 0:
        return z_next, x0
    blocks = -(-channels * side * side // _BLOCK)
    launch(
        _guided_step_kernel, n * blocks,
        tokens, z, x0_before, noise, guidance_scale, coefficients, z_next, x0, n,
        C=channels, OUTPUTS=tokens.shape[2] // (patch_size * patch_size), S=side,
        P=patch_size, GUIDED=guided_channels if len(tokens) == 2 * n else 0,
        BLOCK=_BLOCK, BLOCKS=blocks, num_warps=4,
    )  # fmt: skip
    return z_next, x0
