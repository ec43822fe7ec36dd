"""x + gate · y: the end of the last branch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.triton.launch import launch_rows
from dit_kernels.triton.rows import load_row, store_row


@triton.jit(do_not_specialize=["total", "rows"])
def _gate_residual_kernel(
    x,  # (N, T, D) contiguous
    y,  # (N, T, D) contiguous
    gate,  # (N, D), rows gate_stride apart
    out,  # (N, T, D) contiguous
    tokens,  # T
    total,  # N·T
    rows,  # of one program
    gate_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0) * rows
    for row in range(first, tl.minimum(first + rows, total)):
        image = tl.cast(row // tokens, tl.int64)
        start = tl.cast(row, tl.int64) * D
        branch = load_row(gate + image * gate_stride, D, BLOCK) * load_row(y + start, D, BLOCK)
        values = load_row(x + start, D, BLOCK) + branch
        store_row(out + start, values, D, BLOCK)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x, y (N, T, D) contiguous, gate (N, D) → (N, T, D); ``out`` may be x or y."""
    if out is None:
        out = torch.empty_like(x)
    launch_rows(_gate_residual_kernel, (x, y, gate, out), (gate.stride(0),))
    return out
