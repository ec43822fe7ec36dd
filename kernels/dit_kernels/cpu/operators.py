"""The operators on the CPU in C++: `reference`'s arguments, and ``out`` for results that exist.

Arithmetic is in float32 with one rounding on store, on ``torch.get_num_threads()`` threads.
Tensors are contiguous; gate, shift and scale (N, D) have their rows at any stride. ``out`` has the
results' shapes and dtypes; where an operator says so, it may be an argument. Codes are int8, or
uint8 for int8 codes with 128 added.

Every function raises ValueError for an argument that it does not take, and `Unavailable` where
there is no library (`why_not`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_kernels.cpu.checks import (
    check_contiguous,
    check_exactly,
    check_images,
    check_layout,
    check_modulation,
    check_rows,
    check_tokens,
    pointer_of,
    result,
    results,
    unsigned_codes,
)
from dit_kernels.cpu.loader import DTYPES, ERRORS, INT32, ISAS, load
from dit_kernels.cpu.recording import current


def why_not() -> str | None:
    """Why the native operators cannot run on this machine, or None if they can."""
    return load()[1] or None


def available() -> bool:
    return load()[0] is not None


def isa() -> str:
    """The instruction set in use: "avx2", "avx512", "avx512_bf16" or "amx".

    Raises:
        Unavailable: there is no library.
    """
    return ISAS[_library().dit_isa()]


def layernorm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """x (N, T, D) → LayerNorm(x) · (1 + scale) + shift; out may be x."""
    n, t, d = check_tokens(x)
    out = result("out", out, x.shape, x.dtype)
    modulation = check_modulation(n, d, shift=shift, scale=scale)
    pointers = (x.data_ptr(), shift.data_ptr(), scale.data_ptr(), out.data_ptr())
    call("dit_layernorm_modulate", *pointers, n, t, d, *modulation[0], eps, DTYPES[x.dtype],
          *modulation[1])  # fmt: skip
    return out


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x + gate · y for x, y (N, T, D); out may be x or y."""
    n, t, d = check_tokens(x)
    check_exactly("y", y, x.shape, x.dtype)
    out = result("out", out, x.shape, x.dtype)
    modulation = check_modulation(n, d, gate=gate)
    pointers = (x.data_ptr(), y.data_ptr(), gate.data_ptr(), out.data_ptr())
    call("dit_gate_residual", *pointers, n, t, d, *modulation[0], DTYPES[x.dtype], *modulation[1])
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
    """(r = x + gate · y, its modulated norm); out is a pair, whose first may be x and second y."""
    n, t, d = check_tokens(x)
    check_exactly("y", y, x.shape, x.dtype)
    modulation = check_modulation(n, d, gate=gate, shift=shift, scale=scale)
    residual, normed = results(out, (x.shape, x.dtype), (x.shape, x.dtype))
    pointers = [v.data_ptr() for v in (x, y, gate, shift, scale, residual, normed)]
    call("dit_gate_residual_layernorm_modulate", *pointers, n, t, d, *modulation[0], eps,
          DTYPES[x.dtype], *modulation[1])  # fmt: skip
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
    n, t, d = check_tokens(x)
    modulation = check_modulation(n, d, shift=shift, scale=scale)
    unsigned = unsigned_codes(dtype)
    codes, scales = results(out, (x.shape, dtype), (x.shape[:-1], torch.float32))
    pointers = [v.data_ptr() for v in (x, shift, scale, codes, scales)]
    call("dit_layernorm_modulate_quantize", *pointers, n, t, d, *modulation[0], eps,
          DTYPES[x.dtype], *modulation[1], unsigned)  # fmt: skip
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
    n, t, d = check_tokens(x)
    check_exactly("y", y, x.shape, x.dtype)
    modulation = check_modulation(n, d, gate=gate, shift=shift, scale=scale)
    unsigned = unsigned_codes(dtype)
    residual, codes, scales = results(
        out, (x.shape, x.dtype), (x.shape, dtype), (x.shape[:-1], torch.float32)
    )
    pointers = [v.data_ptr() for v in (x, y, gate, shift, scale, residual, codes, scales)]
    call("dit_gate_residual_layernorm_modulate_quantize", *pointers, n, t, d, *modulation[0], eps,
          DTYPES[x.dtype], *modulation[1], unsigned)  # fmt: skip
    return residual, codes, scales


def gelu(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """½ x (1 + tanh(√(2/π) (x + 0.044715 x³))); out may be x."""
    check_contiguous("x", x)
    out = result("out", out, x.shape, x.dtype)
    call("dit_gelu", x.data_ptr(), out.data_ptr(), x.numel(), DTYPES[x.dtype])
    return out


def bias_gelu(
    x: Tensor, bias: Tensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None
) -> Tensor:
    """GELU(x + bias) for x (…, D) and bias (D,), in x's dtype, or in any if x is float32.

    out may be x if the dtypes are equal.
    """
    rows, d = check_rows(x)
    check_exactly("bias", bias, (d,), None)
    out = result("out", out, x.shape, dtype or (x.dtype if out is None else out.dtype))
    if x.dtype not in (torch.float32, out.dtype):
        raise ValueError(f"x has dtype {x.dtype}; the result's, {out.dtype}, or float32 is needed")
    call("dit_bias_gelu", x.data_ptr(), bias.data_ptr(), out.data_ptr(), rows, d, DTYPES[x.dtype],
          DTYPES[bias.dtype], DTYPES[out.dtype])  # fmt: skip
    return out


def quantize_rows(
    x: Tensor, dtype: torch.dtype = torch.int8, *, out: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """x (…, D) → codes (…, D) and float32 scales (…)."""
    rows, d = check_rows(x)
    unsigned = unsigned_codes(dtype)
    codes, scales = results(out, (x.shape, dtype), (x.shape[:-1], torch.float32))
    call("dit_quantize_rows", x.data_ptr(), codes.data_ptr(), scales.data_ptr(), rows, d,
          DTYPES[x.dtype], unsigned)  # fmt: skip
    return codes, scales


def gelu_quantize(
    x: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.int8,
    *,
    out: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes (…, D) and scales (…) of GELU(x + bias), which is not rounded in between."""
    rows, d = check_rows(x)
    if bias is not None:
        check_exactly("bias", bias, (d,), None)
    unsigned = unsigned_codes(dtype)
    codes, scales = results(out, (x.shape, dtype), (x.shape[:-1], torch.float32))
    bias_dtype = 0 if bias is None else DTYPES[bias.dtype]
    call("dit_gelu_quantize", x.data_ptr(), pointer_of(bias), codes.data_ptr(), scales.data_ptr(),
          rows, d, DTYPES[x.dtype], bias_dtype, unsigned)  # fmt: skip
    return codes, scales


def dequantize_rows(
    acc: Tensor,
    row_scales: Tensor,
    bias: Tensor | None = None,
    gelu: bool = False,
    *,
    col_scales: Tensor | None = None,
    col_offset: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """(acc − col_offset) · row_scales · col_scales + bias, through GELU if asked for.

    acc: (R, M), int32, float32 or of the result's dtype; out may be acc if the dtypes are equal.
    row_scales: (R,) float32; col_scales: (M,) float32; bias: (M,).
    col_offset: (M,) int32: 128 · the sums of the weight's columns where codes had 128 added.
    dtype: of the result; acc's (float32 for int32) unless given.
    """
    if acc.ndim != 2:
        raise ValueError(f"acc has shape {tuple(acc.shape)}; (R, M) is needed")
    rows, cols = acc.shape
    whole = acc.dtype == torch.int32
    check_contiguous("acc", acc, None if whole else DTYPES)
    check_exactly("row_scales", row_scales, (rows,), torch.float32)
    if col_scales is not None:
        check_exactly("col_scales", col_scales, (cols,), torch.float32)
    if col_offset is not None:
        check_exactly("col_offset", col_offset, (cols,), torch.int32)
    if bias is not None:
        check_exactly("bias", bias, (cols,), None)
    if dtype is None:
        dtype = out.dtype if out is not None else torch.float32 if whole else acc.dtype
    out = result("out", out, acc.shape, dtype)
    if acc.dtype not in (torch.int32, torch.float32, dtype):
        raise ValueError(f"acc has dtype {acc.dtype}; int32, float32 or {dtype} is needed")
    call("dit_dequantize_rows", acc.data_ptr(), row_scales.data_ptr(), pointer_of(col_scales),
          pointer_of(col_offset), pointer_of(bias), out.data_ptr(), rows, cols,
          INT32 if whole else DTYPES[acc.dtype], 0 if bias is None else DTYPES[bias.dtype],
          DTYPES[dtype], int(gelu))  # fmt: skip
    return out


def groupnorm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """GroupNorm of x (N, C, H, W) in channels-last memory, and SiLU of it unless silu is False.

    weight and bias (C,) have one dtype; out is in channels-last memory too and may be x.
    """
    check_images("x", x)
    n, c, height, width = x.shape
    if groups < 1 or c % groups:
        raise ValueError(f"groups {groups} does not divide the {c} channels")
    check_exactly("weight", weight, (c,), None)
    check_exactly("bias", bias, (c,), weight.dtype)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.channels_last)
    else:
        check_images("out", out)
        check_layout("out", out, x.shape, x.dtype)
    pointers = [v.data_ptr() for v in (x, weight, bias, out)]
    call("dit_groupnorm_silu", *pointers, n, height * width, c, groups, eps, DTYPES[x.dtype],
          DTYPES[weight.dtype], int(silu))  # fmt: skip
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
    """(z′, x₀) of `operators.guided_step`; out is a pair, which may be (z, x0_before)."""
    m, t, width = check_tokens(tokens, "tokens")
    if z.ndim != 4 or z.shape[2] != z.shape[3]:
        raise ValueError(f"z has shape {tuple(z.shape)}; (N, C, S, S) is needed")
    n, c, s, _ = z.shape
    for name, latents in (("z", z), ("x0_before", x0_before), ("noise", noise)):
        check_exactly(name, latents, z.shape, torch.float32)
    check_exactly("guidance_scale", guidance_scale, (n,), torch.float32)
    check_exactly("coefficients", coefficients, (9,), torch.float32)
    area = patch_size**2
    if patch_size < 1 or s % patch_size or t * area != s * s or width % area or m not in (n, 2 * n):
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}, which is not that of {tuple(z.shape)} "
            f"latents in patches of {patch_size}"
        )
    if width // area not in (c, 2 * c) or not 0 <= guided_channels <= c:
        raise ValueError(
            f"tokens has {width // area} channels, {guided_channels} of them guided; "
            f"{c} or {2 * c}, and at most {c} guided, are needed"
        )
    z_next, x0 = results(out, (z.shape, torch.float32), (z.shape, torch.float32))
    inputs = (tokens, z, x0_before, noise, guidance_scale, coefficients)
    pointers = [v.data_ptr() for v in (*inputs, z_next, x0)]
    call("dit_guided_step", *pointers, m, n, c, width // area, s, patch_size, guided_channels,
          DTYPES[tokens.dtype])  # fmt: skip
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
    if z.ndim != 4 or z.shape[2] != z.shape[3] or patch_size < 1 or z.shape[2] % patch_size:
        raise ValueError(
            f"z has shape {tuple(z.shape)}; (N, C, S, S) in patches of {patch_size} is needed"
        )
    n, c, s, _ = z.shape
    d, tokens = len(bias), (s // patch_size) ** 2
    shapes = {"weight": (c * patch_size**2, d), "bias": (d,), "positions": (tokens, d)}
    check_exactly("z", z, z.shape, torch.float32)
    for (name, shape), tensor in zip(shapes.items(), (weight, bias, positions), strict=True):
        check_exactly(name, tensor, shape, torch.float32)
    dtype = torch.float32 if out is None else out.dtype
    out = result("out", out, (n, tokens, d), dtype)
    pointers = [v.data_ptr() for v in (z, weight, bias, positions, out)]
    call("dit_embed", *pointers, n, c, s, patch_size, d, DTYPES[dtype])
    return out


def attention(qkv: Tensor, num_heads: int, *, out: Tensor | None = None) -> Tensor:
    """qkv (N, T, 3·H·d) → (N, T, H·d), d a multiple of 8 up to 128."""
    n, t, width = check_tokens(qkv, "qkv")
    if num_heads < 1 or width % (24 * num_heads) or width > 3 * 128 * num_heads:
        raise ValueError(
            f"qkv's width {width} with {num_heads} heads; 3 · {num_heads} · d is needed, d a "
            "multiple of 8 up to 128"
        )
    out = result("out", out, (n, t, width // 3), qkv.dtype)
    head = width // 3 // num_heads
    call("dit_attention", qkv.data_ptr(), out.data_ptr(), n, t, num_heads, head,
          DTYPES[qkv.dtype])  # fmt: skip
    return out


def _library() -> Any:
    library, reason = load()
    if library is None:
        from dit_kernels.dispatch import Unavailable

        raise Unavailable(reason)
    return library


def call(name: str, *arguments: Any) -> None:
    """The library's function ``name`` on torch's threads; ValueError for what it refuses."""
    function = getattr(_library(), name)
    code = function(*arguments, torch.get_num_threads())
    if code != 0:
        raise ValueError(f"{name} refused {ERRORS.get(code, f'its arguments (code {code})')}")
    if (recording := current()) is not None:
        recording.add(function, arguments)
