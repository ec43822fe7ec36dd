"""adaLN: LayerNorm(x) · (1 + scale) + shift, one pass over x."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.triton.launch import launch_rows
from dit_kernels.triton.rows import load_row, normalize, store_row


@triton.jit(do_not_specialize=["total", "rows"])
def _layernorm_modulate_kernel(
    x,  # (N, T, D) contiguous
    shift,  # (N, D), rows shift_stride apart
    scale,  # (N, D), rows scale_stride apart
    out,  # (N, T, D) contiguous
    tokens,  # T
    total,  # N·T
    rows,  # of one program
    shift_stride,
    scale_stride,
    eps,
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
        store_row(out + start, normed * factors + shifts, D, BLOCK)


def layernorm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """x (N, T, D) contiguous, shift and scale (N, D) → (N, T, D); ``out`` may be x."""
    if out is None:
        out = torch.empty_like(x)
    strides = shift.stride(0), scale.stride(0)
    launch_rows(_layernorm_modulate_kernel, (x, shift, scale, out), (*strides, eps))
    return out
