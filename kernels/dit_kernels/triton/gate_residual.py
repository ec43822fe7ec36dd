"""x + gate · y: the end of the last branch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.triton.launch import launch_rows
from dit_kernels.triton.rows import load_columns, load_rows, store_rows


@triton.jit
def _gate_residual_kernel(
    x,  # (N, T, D) contiguous
    y,  # (N, T, D) contiguous
    gate,  # (N, D), rows gate_stride apart
    out,  # (N, T, D) contiguous
    tokens,  # T
    blocks,  # programs per image
    gate_stride,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    rows = (program % blocks) * ROWS + tl.arange(0, ROWS)
    valid = rows < tokens
    x += image * tokens * D
    y += image * tokens * D
    out += image * tokens * D
    gate += image * gate_stride
    head = load_columns(gate, 0, HEAD, D) * load_rows(y, rows, valid, 0, HEAD, D)
    store_rows(out, load_rows(x, rows, valid, 0, HEAD, D) + head, rows, valid, 0, HEAD, D)
    if TAIL > 0:
        tail = load_columns(gate, HEAD, TAIL, D) * load_rows(y, rows, valid, HEAD, TAIL, D)
        tail = load_rows(x, rows, valid, HEAD, TAIL, D) + tail
        store_rows(out, tail, rows, valid, HEAD, TAIL, D)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x, y (N, T, D) contiguous, gate (N, D) → (N, T, D); ``out`` may be x or y."""
    if out is None:
        out = torch.empty_like(x)
    launch_rows(_gate_residual_kernel, (x, y, gate, out), (gate.stride(0),))
    return out
