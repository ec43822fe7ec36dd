"""The end of one branch and the start of the next, with quantised values for an fp8 product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.triton.gate_residual_layernorm_modulate import gated_sum
from dit_kernels.triton.launch import launch_rows
from dit_kernels.triton.quantize_rows import check_codes_on, code_limit, new_codes
from dit_kernels.triton.rows import load_row, normalize, quantize, store_row


@triton.jit(do_not_specialize=["total", "rows"])
def _gate_residual_layernorm_modulate_quantize_kernel(
    x,  # (N, T, D) contiguous
    y,  # (N, T, D) contiguous
    gate,  # (N, D), rows gate_stride apart
    shift,  # (N, D), rows shift_stride apart
    scale,  # (N, D), rows scale_stride apart
    residual,  # (N, T, D) contiguous
    codes,  # (N, T, D) contiguous
    scales,  # (N, T) contiguous
    tokens,  # T
    total,  # N·T
    rows,  # of one program
    gate_stride,
    shift_stride,
    scale_stride,
    eps,
    LIMIT: tl.constexpr,
    INTEGER: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0) * rows
    for row in range(first, tl.minimum(first + rows, total)):
        image = tl.cast(row // tokens, tl.int64)
        start = tl.cast(row, tl.int64) * D
        shifts = load_row(shift + image * shift_stride, D, BLOCK)
        factors = 1 + load_row(scale + image * scale_stride, D, BLOCK)
        values = gated_sum(
            x + start, y + start, gate + image * gate_stride, None, 0, residual + start, 1, D, BLOCK
        )
        normed = normalize(values, eps, D, BLOCK) * factors + shifts
        row_codes, row_scale = quantize(normed, LIMIT, INTEGER, EXACT=False)
        tl.store(scales + row, row_scale)
        store_row(codes + start, row_codes, D, BLOCK)


def gate_residual_layernorm_modulate_quantize(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, y (N, T, D) contiguous, gate, shift, scale (N, D) → (r, codes, scales).

    r = x + gate · y is (N, T, D). The codes (N, T, D) with float32 scales (N, T) are its modulated
    norm, quantised per row. ``out`` holds the three results; r may be x or y.

    Raises:
        ValueError: float8 on a GPU older than compute capability 8.9.
    """
    check_codes_on(x.device, dtype)
    results = out or (torch.empty_like(x), *new_codes(x, dtype))
    launch_rows(
        _gate_residual_layernorm_modulate_quantize_kernel,
        (x, y, gate, shift, scale, *results),
        (gate.stride(0), shift.stride(0), scale.stride(0), eps),
        LIMIT=code_limit(dtype), INTEGER=dtype == torch.int8,
    )  # fmt: skip
    return results
