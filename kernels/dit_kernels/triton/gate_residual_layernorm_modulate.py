"""The end of one branch and the start of the next: r = x + gate · y and adaLN of r, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.triton.launch import launch_rows
from dit_kernels.triton.rows import load_columns, load_rows, modulate, normalize, store_rows


@triton.jit
def _gate_residual_layernorm_modulate_kernel(
    x,  # (N, T, D) contiguous
    y,  # (N, T, D) contiguous
    gate,  # (N, D), rows gate_stride apart
    shift,  # (N, D), rows shift_stride apart
    scale,  # (N, D), rows scale_stride apart
    residual,  # (N, T, D) contiguous
    out,  # (N, T, D) contiguous
    tokens,  # T
    blocks,  # programs per image
    gate_stride,
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
    y += image * tokens * D
    residual += image * tokens * D
    out += image * tokens * D
    gate += image * gate_stride
    shift += image * shift_stride
    scale += image * scale_stride
    # The norm reads the rounded sum, as a later step that starts from it will.
    rounded = residual.dtype.element_ty
    head = load_columns(gate, 0, HEAD, D) * load_rows(y, rows, valid, 0, HEAD, D)
    head = (load_rows(x, rows, valid, 0, HEAD, D) + head).to(rounded)
    store_rows(residual, head, rows, valid, 0, HEAD, D)
    head = head.to(tl.float32)
    tail = head
    if TAIL > 0:
        tail = load_columns(gate, HEAD, TAIL, D) * load_rows(y, rows, valid, HEAD, TAIL, D)
        tail = (load_rows(x, rows, valid, HEAD, TAIL, D) + tail).to(rounded)
        store_rows(residual, tail, rows, valid, HEAD, TAIL, D)
        tail = tail.to(tl.float32)
    head, tail = normalize(head, tail, eps, HEAD, TAIL, D)
    store_rows(out, modulate(head, shift, scale, 0, HEAD, D), rows, valid, 0, HEAD, D)
    if TAIL > 0:
        tail = modulate(tail, shift, scale, HEAD, TAIL, D)
        store_rows(out, tail, rows, valid, HEAD, TAIL, D)


def gate_residual_layernorm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """x, y (N, T, D) contiguous, gate, shift, scale (N, D) → (r, its modulated norm).

    ``out`` holds both results, each (N, T, D); r may be x or y, the norm may be y.
    """
    residual, normed = (torch.empty_like(x), torch.empty_like(x)) if out is None else out
    tensors = (x, y, gate, shift, scale, residual, normed)
    strides = gate.stride(0), shift.stride(0), scale.stride(0)
    launch_rows(_gate_residual_layernorm_modulate_kernel, tensors, (*strides, eps))
    return residual, normed
