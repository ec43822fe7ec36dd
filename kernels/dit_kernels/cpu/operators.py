"""The operators on the CPU in C++: `reference`'s arguments, and ``out`` for memory to write into.

Arithmetic is in float32 with one rounding on store, on ``torch.get_num_threads()`` threads.
Tensors are contiguous; gate, shift and scale (N, D) have their rows at any stride. ``out`` has the
results' shapes and dtypes; where an operator says so, it may be one of the arguments. Codes are
int8, or uint8 for int8 codes with 128 added.

Every function raises ValueError for an argument that it does not take, and `Unavailable` where
there is no library (`why_not`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_kernels import checks
from dit_kernels.checks import DTYPES
from dit_kernels.cpu.loader import available as available
from dit_kernels.cpu.loader import isa as isa
from dit_kernels.cpu.loader import why_not as why_not
from dit_kernels.cpu.recording import call

CODES = (torch.int8, torch.uint8)


def layernorm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """x (N, T, D) → LayerNorm(x) · (1 + scale) + shift; out may be x."""
    sizes = _tokens(x, shift=shift, scale=scale)
    out = result("out", out, x.shape, x.dtype)
    call("dit_layernorm_modulate", x, shift, scale, out, *sizes, shift.stride(0), scale.stride(0),
         eps, x.dtype, shift.dtype, scale.dtype)  # fmt: skip
    return out


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x + gate · y for x, y (N, T, D); out may be x or y."""
    sizes = _tokens(x, y, gate=gate)
    out = result("out", out, x.shape, x.dtype)
    call("dit_gate_residual", x, y, gate, out, *sizes, gate.stride(0), x.dtype, gate.dtype)
    return out


def gate_residual_layernorm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    *,
    out: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(r = x + gate · y, its modulated norm); out is a pair: r may be x, the norm may be y."""
    sizes = _tokens(x, y, gate=gate, shift=shift, scale=scale)
    residual, normed = results(out, (x.shape, x.dtype), (x.shape, x.dtype))
    call("dit_gate_residual_layernorm_modulate", x, y, gate, shift, scale, residual, normed, *sizes,
         gate.stride(0), shift.stride(0), scale.stride(0), eps,
         x.dtype, gate.dtype, shift.dtype, scale.dtype)  # fmt: skip
    return residual, normed


def layernorm_modulate_quantize(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    dtype: torch.dtype = torch.int8,
    *,
    out: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes (N, T, D) and float32 scales (N, T) of `layernorm_modulate`'s unrounded result."""
    sizes = _tokens(x, shift=shift, scale=scale)
    checks.check_codes(dtype, CODES)
    codes, scales = results(out, (x.shape, dtype), (x.shape[:-1], torch.float32))
    call("dit_layernorm_modulate_quantize", x, shift, scale, codes, scales, *sizes,
         shift.stride(0), scale.stride(0), eps, x.dtype, shift.dtype, scale.dtype,
         dtype == torch.uint8)  # fmt: skip
    return codes, scales


def gate_residual_layernorm_modulate_quantize(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    dtype: torch.dtype = torch.int8,
    *,
    out: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(r = x + gate · y, codes (N, T, D) and scales (N, T) of its modulated norm).

    out is a triple, whose first may be x.
    """
    sizes = _tokens(x, y, gate=gate, shift=shift, scale=scale)
    checks.check_codes(dtype, CODES)
    residual, codes, scales = results(
        out, (x.shape, x.dtype), (x.shape, dtype), (x.shape[:-1], torch.float32)
    )
    call("dit_gate_residual_layernorm_modulate_quantize", x, y, gate, shift, scale, residual, codes,
         scales, *sizes, gate.stride(0), shift.stride(0), scale.stride(0), eps, x.dtype,
         gate.dtype, shift.dtype, scale.dtype, dtype == torch.uint8)  # fmt: skip
    return residual, codes, scales


def gelu(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """½ x (1 + tanh(√(2/π) (x + 0.044715 x³))); out may be x."""
    checks.check_dtype("x", x)
    checks.check_contiguous("x", x)
    _check_on_cpu("x", x)
    out = result("out", out, x.shape, x.dtype)
    call("dit_gelu", x, out, x.numel(), x.dtype)
    return out


def quantize_rows(
    x: Tensor, dtype: torch.dtype = torch.int8, *, out: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """x (…, D) → codes (…, D) and float32 scales (…)."""
    rows, d = _rows(x)
    checks.check_codes(dtype, CODES)
    codes, scales = results(out, (x.shape, dtype), (x.shape[:-1], torch.float32))
    call("dit_quantize_rows", x, codes, scales, rows, d, x.dtype, dtype == torch.uint8)
    return codes, scales


def dequantize_rows(
    x: Tensor, scales: Tensor, bias: Tensor, gelu: bool, *, out: Tensor | None = None
) -> Tensor:
    """x (R, M) · scales (R,) + bias (M,), through GELU if asked for; out may be x.

    scales are float32; bias may have another dtype than x.
    """
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; (R, M) is needed")
    rows, d = x.shape
    _vectors(x.shape, DTYPES, x=x)
    _vectors((rows,), scales=scales)
    _vectors((d,), DTYPES, bias=bias)
    out = result("out", out, x.shape, x.dtype)
    call("dit_dequantize_rows", x, scales, bias, out, rows, d, x.dtype, bias.dtype, gelu)
    return out


def groupnorm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """SiLU of GroupNorm of x (N, C, H, W) in channels-last memory.

    weight and bias (C,) have one dtype; out is in channels-last memory too and may be x.
    """
    checks.check_images(x, groups, weight, bias)
    checks.check_eps(eps)
    _check_on_cpu("x", x)
    checks.check_dtype("bias", bias, (weight.dtype,))
    if out is None:
        out = torch.empty_like(x, memory_format=torch.channels_last)
    else:
        checks.check_channels_last("out", out)
        result("out", out.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1).shape, x.dtype)
    n, c, height, width = x.shape
    call("dit_groupnorm_silu", x, weight, bias, out, n, height * width, c, groups, eps, x.dtype,
         weight.dtype)  # fmt: skip
    return out


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
    out: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(z′, x₀) of `dit_kernels.guided_step`; out is a pair, which may be (z, x0_before)."""
    inputs = (tokens, z, x0_before, noise, guidance_scale, coefficients)
    checks.check_guided_step(*inputs, guided_channels, patch_size)
    _check_on_cpu("z", z)
    z_next, x0 = results(out, (z.shape, torch.float32), (z.shape, torch.float32))
    n, c, s, _ = z.shape
    call("dit_guided_step", *inputs, z_next, x0, len(tokens), n, c,
         tokens.shape[2] // patch_size**2, s, patch_size, guided_channels,
         tokens.dtype)  # fmt: skip
    return z_next, x0


def embed(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor,
    patch_size: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Latents z (N, C, S, S) → tokens (N, T, D): their patches · weight + bias + positions.

    z, weight (C·p·p, D), bias (D,) and positions (T, D) are float32; out may have any dtype.
    """
    n, c, s = checks.check_latents(z, patch_size)
    d, tokens = len(bias), (s // patch_size) ** 2
    _vectors(z.shape, z=z)
    _vectors((c * patch_size**2, d), weight=weight)
    _vectors((d,), bias=bias)
    _vectors((tokens, d), positions=positions)
    out = result("out", out, (n, tokens, d), torch.float32 if out is None else out.dtype)
    call("dit_embed", z, weight, bias, positions, out, n, c, s, patch_size, d, out.dtype)
    return out


def attention(qkv: Tensor, num_heads: int, *, out: Tensor | None = None) -> Tensor:
    """qkv (N, T, 3·H·d) → (N, T, H·d), d a multiple of 8 up to 128."""
    n, t, d = checks.check_qkv(qkv, num_heads)
    _check_on_cpu("qkv", qkv)
    out = result("out", out, (n, t, num_heads * d), qkv.dtype)
    call("dit_attention", qkv, out, n, t, num_heads, d, qkv.dtype)
    return out


def _tokens(x: Tensor, y: Tensor | None = None, **modulation: Tensor) -> tuple[int, int, int]:
    """(N, T, D) of x and y, after checks of all."""
    sizes = checks.check_tokens("x", x)
    _check_on_cpu("x", x)
    if y is not None:
        checks.check_same("y", y, x)
    checks.check_modulation(x, **modulation)
    return sizes


def _rows(x: Tensor) -> tuple[int, int]:
    _check_on_cpu("x", x)
    return checks.check_rows("x", x)


def _vectors(
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    **tensors: Tensor,
) -> None:
    for name, tensor in tensors.items():
        checks.check_exact(name, tensor, shape, dtypes)
        _check_on_cpu(name, tensor)


def _check_on_cpu(name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}; the CPU is needed")


def result(name: str, out: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``out`` if it is contiguous memory of this shape and dtype, or new memory if it is None."""
    if dtype not in (*DTYPES, *CODES):
        raise ValueError(f"dtype {dtype}: choose float32, bfloat16 or float16")
    if out is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    _vectors(shape, (dtype,), **{name: out})
    return out


def results(
    out: Sequence[Tensor] | None, *needed: tuple[Sequence[int], torch.dtype]
) -> list[Tensor]:
    """One `result` per (shape, dtype)."""
    given = [None] * len(needed) if out is None else out
    if len(given) != len(needed):
        raise ValueError(f"out has {len(given)} tensors; {len(needed)} are needed")
    return [
        result(f"out[{i}]", tensor, *each)
        for i, (tensor, each) in enumerate(zip(given, needed, strict=True))
    ]
