"""x + gate · y: the end of the last branch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.triton.launch import launch_rows
from dit_kernels.triton.rows import load_row, store_row


@triton.jit(do_not_specialize=["rows", "blocks"])
def _gate_residual_kernel(
    x,  # (N, T, D) contiguous
    y,  # (N, T, D) contiguous
    gate,  # (N, D), rows gate_stride apart
    out,  # (N, T, D) contiguous
    tokens,  # T
    rows,  # of one program
    blocks,  # programs per image
    gate_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    first = (program % blocks) * rows
    x += image * tokens * D
    y += image * tokens * D
    out += image * tokens * D
    gate += image * gate_stride
    for row in range(first, tl.minimum(first + rows, tokens)):
        branch = load_row(gate, D, BLOCK) * load_row(y + row * D, D, BLOCK)
        values = load_row(x + row * D, D, BLOCK) + branch
        store_row(out + row * D, values, D, BLOCK)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x, y (N, T, D) contiguous, gate (N, D) → (N, T, D); ``out`` may be x or y."""
    if out is None:
        out = torch.empty_like(x)
    launch_rows(_gate_residual_kernel, (x, y, gate, out), (gate.stride(0),))
    return out
