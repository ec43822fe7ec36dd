"""adaLN: LayerNorm(x) · (1 + scale) + shift, one pass over x."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.triton.launch import launch_rows
from dit_kernels.triton.rows import load_rows, modulate, normalize, store_rows


@triton.jit
def _layernorm_modulate_kernel(
    x,  # (N, T, D) contiguous
    shift,  # (N, D), rows shift_stride apart
    scale,  # (N, D), rows scale_stride apart
    out,  # (N, T, D) contiguous
    tokens,  # T
    blocks,  # programs per image
    shift_stride,
    scale_stride,
    eps,
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
    out += image * tokens * D
    shift += image * shift_stride
    scale += image * scale_stride
    head = load_rows(x, rows, valid, 0, HEAD, D)
    tail = head
    if TAIL > 0:
        tail = load_rows(x, rows, valid, HEAD, TAIL, D)
    head, tail = normalize(head, tail, eps, HEAD, TAIL, D)
    store_rows(out, modulate(head, shift, scale, 0, HEAD, D), rows, valid, 0, HEAD, D)
    if TAIL > 0:
        tail = modulate(tail, shift, scale, HEAD, TAIL, D)
        store_rows(out, tail, rows, valid, HEAD, TAIL, D)


def layernorm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """x (N, T, D) contiguous, shift and scale (N, D) → (N, T, D); ``out`` may be x."""
    if out is None:
        out = torch.empty_like(x)
    strides = shift.stride(0), scale.stride(0)
    launch_rows(_layernorm_modulate_kernel, (x, shift, scale, out), (*strides, eps))
    return out
