"""Every operator in plain torch, float32 inside: the definition of correct. Shapes: `operators`.

Shape letters: N images, T tokens, D width, H heads, d = D/H, C channels, S latent side, p patch.
float64 inputs are computed in float64; tests measure the errors of all others against that.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float32, or in float64 if they are that, for the arithmetic in between."""
    return tuple(t if t.dtype == torch.float64 else t.float() for t in tensors)


def layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    wide, shift, scale = _wide(x, shift, scale)
    normed = F.layer_norm(wide, wide.shape[-1:], eps=eps)
    return (normed * (1 + scale[:, None]) + shift[:, None]).to(x.dtype)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    wide, y, gate = _wide(x, y, gate)
    return (wide + gate[:, None] * y).to(x.dtype)


def gate_residual_layernorm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    # The norm reads the rounded sum, so that a later step that starts from it agrees.
    residual = gate_residual(x, y, gate)
    return residual, layernorm_modulate(residual, shift, scale, eps)


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    n, t, width = qkv.shape
    d = width // 3 // num_heads
    (wide,) = _wide(qkv)
    q, k, v = wide.view(n, t, 3, num_heads, d).permute(2, 0, 3, 1, 4)  # each (N, H, T, d)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(d)).softmax(-1)  # (N, H, T, T)
    return (weights @ v).transpose(1, 2).reshape(n, t, width // 3).to(qkv.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(*_wide(x, weight, bias)).to(x.dtype)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(*_wide(x, weight, bias)), approximate="tanh").to(x.dtype)


def embed(z: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, patch_size: int) -> Tensor:
    """The first layer: latents (N, C, S, S) → tokens (N, T, D); weight (C·p·p, D)."""
    patches = F.unfold(z, patch_size, stride=patch_size)  # (N, C·p·p, T)
    return F.linear(patches.transpose(1, 2), weight.t(), bias) + positions


def groupnorm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *, add: Tensor | None = None,
    shift: Tensor | None = None, silu: bool = True,
) -> Tensor:  # fmt: skip
    """SiLU(GroupNorm(x + shift)) for x (N, C, H, W), shift (C,) float32; no SiLU if ``silu`` is
    False. ``add`` (N, C, H, W) is first added to x, in place."""
    if add is not None:
        x.add_(add)
    wide, weight, bias = _wide(x, weight, bias)
    if shift is not None:
        wide = wide + shift.view(-1, 1, 1)
    normed = F.group_norm(wide, groups, weight, bias, eps)
    return (F.silu(normed) if silu else normed).to(x.dtype)


def add_shift(x: Tensor, y: Tensor, shift: Tensor) -> Tensor:
    """x += y + shift, in place, for images (N, C, H, W) and shift (C,)."""
    return x.add_(y + shift.view(-1, 1, 1))


def softmax(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """softmax(scale · scores) over the last dimension, computed in the scores' own dtype."""
    return torch.softmax(scores * scale, -1).to(dtype)


def guided_step(
    tokens: Tensor,
    z: Tensor,
    x0_before: Tensor,
    noise: Tensor,
    guidance_scale: Tensor,
    coefficients: Tensor,
    guided_channels: int,
    patch_size: int,
) -> tuple[Tensor, Tensor]:
    n, c, s, _ = z.shape
    side, p = s // patch_size, patch_size
    patches = tokens.to(z.dtype).view(len(tokens), side, side, p, p, -1)
    output = patches.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, s, s)  # (M, C_out, S, S)
    eps = output[:n, :c].clone()
    if len(tokens) == 2 * n:
        g = slice(0, guided_channels)
        scale = guidance_scale.to(z.dtype).view(-1, 1, 1, 1)  # (N, 1, 1, 1)
        guided = output[n:, g] + scale * (eps[:, g] - output[n:, g])
        eps[:, g] = torch.where(scale == 1, eps[:, g], guided)
    x0_z, x0_eps, to_x0, to_z, to_eps, to_before, low, high, std = coefficients.to(z.dtype)
    x0 = x0_z * z + x0_eps * eps
    if output.shape[1] == 2 * c:  # learned variance: between the logarithms low and high
        std = std * torch.exp(0.5 * (low + (output[:n, c:] + 1) / 2 * (high - low)))
    mean = to_x0 * x0 + to_z * z + to_eps * eps + to_before * x0_before
    return torch.where(std == 0, mean, mean + std * noise), x0


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (…, D) → codes (…, D) and float32 scales (…): x ≈ codes · scale, symmetric, per row.

    dtype: int8, float8_e4m3fn, or uint8 for int8 codes with 128 added.
    """
    limit = torch.finfo(dtype).max if dtype.is_floating_point else 127.0
    (wide,) = _wide(x)
    scale = wide.abs().amax(-1).clamp(min=1e-12) / limit
    codes = wide / scale.unsqueeze(-1)
    if not dtype.is_floating_point:
        codes = codes.round().clamp(-limit, limit) + (128 if dtype == torch.uint8 else 0)
    return codes.to(dtype), scale.float()


def layernorm_modulate_quantize(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    x, shift, scale = _wide(x, shift, scale)
    return quantize_rows(layernorm_modulate(x, shift, scale, eps), dtype)


def gate_residual_layernorm_modulate_quantize(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    residual = gate_residual(x, y, gate)
    return residual, *layernorm_modulate_quantize(residual, shift, scale, eps, dtype)


def gelu_quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return quantize_rows(gelu(*_wide(x)), dtype)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(*_wide(x), approximate="tanh").to(x.dtype)
