"""adaLN whose result is codes with one scale per token, for an int8 or fp8 linear."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.triton.launch import launch_rows
from dit_kernels.triton.quantize_rows import check_codes_on, code_limit, new_codes
from dit_kernels.triton.rows import load_row, normalize, quantize, store_row


@triton.jit(do_not_specialize=["total", "rows"])
def _layernorm_modulate_quantize_kernel(
    x,  # (N, T, D) contiguous
    shift,  # (N, D), rows shift_stride apart
    scale,  # (N, D), rows scale_stride apart
    codes,  # (N, T, D) contiguous
    scales,  # (N, T) contiguous
    tokens,  # T
    total,  # N·T
    rows,  # of one program
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
        normed = normalize(load_row(x + start, D, BLOCK), eps, D, BLOCK)
        row_codes, row_scale = quantize(normed * factors + shifts, LIMIT, INTEGER, EXACT=False)
        tl.store(scales + row, row_scale)
        store_row(codes + start, row_codes, D, BLOCK)


def layernorm_modulate_quantize(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """x (N, T, D) contiguous, shift, scale (N, D) → codes (N, T, D), float32 scales (N, T).

    Raises:
        ValueError: float8 on a GPU older than compute capability 8.9.
    """
    check_codes_on(x.device, dtype)
    codes, scales = out or new_codes(x, dtype)
    launch_rows(
        _layernorm_modulate_quantize_kernel, (x, shift, scale, codes, scales),
        (shift.stride(0), scale.stride(0), eps),
        LIMIT=code_limit(dtype), INTEGER=dtype == torch.int8,
    )  # fmt: skip
    return codes, scales
