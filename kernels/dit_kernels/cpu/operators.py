"""The operators on the CPU, in C++. They take `reference`'s arguments, and ``out`` to write into.

Arithmetic is in float32 with one rounding on store, on ``torch.get_num_threads()`` threads.
Tensors are contiguous; gate, shift and scale (N, D) have their rows at any stride. ``out`` has the
results' shapes and dtypes; where an operator says so, it may be one of the arguments. Codes are
int8, or uint8 for int8 codes with 128 added.

Every function raises ValueError for an argument that it does not take, and `Unavailable` if
there is no library (`why_not`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_kernels import checks
from dit_kernels.checks import FLOAT
from dit_kernels.cpu.loader import available as available
from dit_kernels.cpu.loader import isa as isa
from dit_kernels.cpu.loader import why_not as why_not
from dit_kernels.cpu.recording import call

CODES = (torch.int8, torch.uint8)
CPU = torch.device("cpu")
Out = Tensor | None
Outs = Sequence[Tensor] | None


def layernorm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, *, out: Out = None
) -> Tensor:
    """x (N, T, D) → LayerNorm(x) · (1 + scale) + shift; out may be x."""
    sizes = checks.check_tokens(_on_cpu(x), shift=shift, scale=scale)
    out = result(out, x.shape, x.dtype)
    call("dit_layernorm_modulate", x, shift, scale, out, *sizes, shift.stride(0), scale.stride(0),
         eps, x.dtype, shift.dtype, scale.dtype)  # fmt: skip
    return out


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, *, out: Out = None) -> Tensor:
    """x + gate · y for x, y (N, T, D); out may be x or y."""
    sizes = checks.check_tokens(_on_cpu(x), y, gate=gate)
    out = result(out, x.shape, x.dtype)
    call("dit_gate_residual", x, y, gate, out, *sizes, gate.stride(0), x.dtype, gate.dtype)
    return out


def gate_residual_layernorm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float,
    *, out: Outs = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(r = x + gate · y, its modulated norm); out is a pair: r may be x, the norm may be y."""
    sizes = checks.check_tokens(_on_cpu(x), y, gate=gate, shift=shift, scale=scale)
    residual, normed = results(out, (x.shape, x.dtype), (x.shape, x.dtype))
    call("dit_gate_residual_layernorm_modulate", x, y, gate, shift, scale, residual, normed, *sizes,
         gate.stride(0), shift.stride(0), scale.stride(0), eps,
         x.dtype, gate.dtype, shift.dtype, scale.dtype)  # fmt: skip
    return residual, normed


def layernorm_modulate_quantize(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype = torch.int8,
    *, out: Outs = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes (N, T, D) and float32 scales (N, T) of `layernorm_modulate`'s unrounded result."""
    sizes = checks.check_tokens(_on_cpu(x), shift=shift, scale=scale)
    codes, scales = results(out, *_codes_of(x, dtype))
    call("dit_layernorm_modulate_quantize", x, shift, scale, codes, scales, *sizes,
         shift.stride(0), scale.stride(0), eps, x.dtype, shift.dtype, scale.dtype,
         dtype == torch.uint8)  # fmt: skip
    return codes, scales


def gate_residual_layernorm_modulate_quantize(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float,
    dtype: torch.dtype = torch.int8, *, out: Outs = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(r = x + gate · y, codes (N, T, D) and scales (N, T) of its modulated norm).

    out is a triple; its first tensor may be x.
    """
    sizes = checks.check_tokens(_on_cpu(x), y, gate=gate, shift=shift, scale=scale)
    residual, codes, scales = results(out, (x.shape, x.dtype), *_codes_of(x, dtype))
    call("dit_gate_residual_layernorm_modulate_quantize", x, y, gate, shift, scale, residual, codes,
         scales, *sizes, gate.stride(0), shift.stride(0), scale.stride(0), eps, x.dtype,
         gate.dtype, shift.dtype, scale.dtype, dtype == torch.uint8)  # fmt: skip
    return residual, codes, scales


def gelu(x: Tensor, *, out: Out = None) -> Tensor:
    """½ x (1 + tanh(√(2/π) (x + 0.044715 x³))); out may be x."""
    checks.check("x", _on_cpu(x), x.shape)
    out = result(out, x.shape, x.dtype)
    call("dit_gelu", x, out, x.numel(), x.dtype)
    return out


def quantize_rows(
    x: Tensor, dtype: torch.dtype = torch.int8, *, out: Outs = None
) -> tuple[Tensor, Tensor]:
    """x (…, D) → codes (…, D) and float32 scales (…)."""
    checks.check_rows(_on_cpu(x))
    codes, scales = results(out, *_codes_of(x, dtype))
    call("dit_quantize_rows", x, codes, scales, scales.numel(), x.shape[-1], x.dtype,
         dtype == torch.uint8)  # fmt: skip
    return codes, scales


def dequantize_rows(
    x: Tensor, scales: Tensor, bias: Tensor, gelu: bool, *, out: Out = None
) -> Tensor:
    """x (R, M) · scales (R,) + bias (M,), through GELU if asked for; out may be x.

    scales are float32; bias may have another dtype than x.
    """
    checks.check("x", x, ("N", "M"), device=CPU)
    rows, d = x.shape
    checks.check("scales", scales, (rows,), FLOAT, CPU)
    checks.check("bias", bias, (d,), device=CPU)
    out = result(out, x.shape, x.dtype)
    call("dit_dequantize_rows", x, scales, bias, out, rows, d, x.dtype, bias.dtype, gelu)
    return out


def groupnorm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *, out: Out = None
) -> Tensor:
    """SiLU of GroupNorm of x (N, C, H, W) in channels-last memory.

    weight and bias (C,) have one dtype; out is in channels-last memory too and may be x.
    """
    checks.check_images(_on_cpu(x), groups, weight, bias, eps)
    checks.check("bias", bias, weight.shape, (weight.dtype,))
    if out is None:
        out = torch.empty_like(x, memory_format=torch.channels_last)
    checks.check("out", out, x.shape, (x.dtype,), CPU, torch.channels_last)
    n, c, height, width = x.shape
    call("dit_groupnorm_silu", x, weight, bias, out, n, height * width, c, groups, eps, x.dtype,
         weight.dtype)  # fmt: skip
    return out


def guided_step(
    tokens: Tensor, z: Tensor, x0_before: Tensor, noise: Tensor, guidance_scale: Tensor,
    coefficients: Tensor, guided_channels: int, patch_size: int, *, out: Outs = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(z′, x₀) of `dit_kernels.guided_step`; out is a pair, which may be (z, x0_before)."""
    inputs = (tokens, z, x0_before, noise, guidance_scale, coefficients)
    checks.check_guided_step(*inputs, guided_channels, patch_size)
    n, c, s, _ = _on_cpu(z).shape
    z_next, x0 = results(out, (z.shape, torch.float32), (z.shape, torch.float32))
    call("dit_guided_step", *inputs, z_next, x0, len(tokens), n, c,
         tokens.shape[2] // patch_size**2, s, patch_size, guided_channels,
         tokens.dtype)  # fmt: skip
    return z_next, x0


def embed(
    z: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, patch_size: int, *, out: Out = None
) -> Tensor:
    """Latents z (N, C, S, S) → tokens (N, T, D): their patches · weight + bias + positions.

    z, weight (C·p·p, D), bias (D,) and positions (T, D) are float32; out may have any dtype.
    """
    n, c, s = checks.check_latents(_on_cpu(z), patch_size)
    d, tokens = len(bias), (s // patch_size) ** 2
    checks.check("weight", weight, (c * patch_size**2, d), FLOAT, CPU)
    checks.check("bias", bias, (d,), FLOAT, CPU)
    checks.check("positions", positions, (tokens, d), FLOAT, CPU)
    out = result(out, (n, tokens, d), torch.float32 if out is None else out.dtype)
    call("dit_embed", z, weight, bias, positions, out, n, c, s, patch_size, d, out.dtype)
    return out


def attention(qkv: Tensor, num_heads: int, *, out: Out = None) -> Tensor:
    """qkv (N, T, 3·H·d) → (N, T, H·d), d a multiple of 8 up to 128."""
    n, t, d = checks.check_qkv(_on_cpu(qkv, "qkv"), num_heads)
    out = result(out, (n, t, num_heads * d), qkv.dtype)
    call("dit_attention", qkv, out, n, t, num_heads, d, qkv.dtype)
    return out


def _on_cpu(x: Tensor, name: str = "x") -> Tensor:
    if x.device.type != "cpu":
        raise ValueError(f"{name} is on {x.device}; the CPU is needed")
    return x


def _codes_of(x: Tensor, dtype: torch.dtype) -> tuple[tuple[torch.Size, torch.dtype], ...]:
    """Shapes and dtypes of x's codes and scales."""
    checks.check_codes(dtype, CODES)
    return (x.shape, dtype), (x.shape[:-1], torch.float32)


def result(out: Out, shape: Sequence[int], dtype: torch.dtype, name: str = "out") -> Tensor:
    """``out`` if it is contiguous memory of this shape and dtype, or new memory if it is None."""
    if dtype not in (*checks.DTYPES, *CODES):
        raise ValueError(f"dtype {dtype}: choose float32, bfloat16 or float16")
    if out is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    checks.check(name, out, shape, (dtype,), CPU)
    return out


def results(out: Outs, *needed: tuple[Sequence[int], torch.dtype]) -> list[Tensor]:
    """One `result` per (shape, dtype)."""
    given = [None] * len(needed) if out is None else out
    if len(given) != len(needed):
        raise ValueError(f"out has {len(given)} tensors; {len(needed)} are needed")
    pairs = zip(given, needed, strict=True)
    return [result(tensor, *each, f"out[{i}]") for i, (tensor, each) in enumerate(pairs)]
