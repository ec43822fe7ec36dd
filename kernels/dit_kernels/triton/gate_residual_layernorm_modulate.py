"""The end of one branch and the start of the next: r = x + gate · y and adaLN of r, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.triton.launch import launch_rows
from dit_kernels.triton.rows import load_row, normalize, store_row


@triton.jit
def gated_sum(
    x,  # (D,), of this row
    y,  # (D,), of this row in the first part
    gate,  # (D,)
    bias,  # (D,) or None
    part_stride,  # from one part of y to the next
    residual,  # (D,)
    SPLITS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x + gate · (sum of the parts of y + bias), written to ``residual`` and returned as rounded
    there."""
    branch = load_row(y, D, BLOCK)
    for part in tl.static_range(1, SPLITS):
        branch += load_row(y + part * part_stride, D, BLOCK)
    if bias is not None:
        branch += load_row(bias, D, BLOCK)
    values = load_row(x, D, BLOCK) + load_row(gate, D, BLOCK) * branch
    values = values.to(residual.dtype.element_ty)
    store_row(residual, values, D, BLOCK)
    # The norm reads the rounded sum, because later kernels read it too.
    return values.to(tl.float32)


@triton.jit(do_not_specialize=["total", "rows"])
def _gate_residual_layernorm_modulate_kernel(
    x,  # (N, T, D) contiguous
    y,  # (N, T, D) contiguous, or with a bias (SPLITS, N, T, D)
    gate,  # (N, D), rows gate_stride apart
    shift,  # (N, D), rows shift_stride apart
    scale,  # (N, D), rows scale_stride apart
    residual,  # (N, T, D) contiguous
    out,  # (N, T, D) contiguous
    bias,  # (D,) or None
    tokens,  # T
    total,  # N·T
    rows,  # of one program
    gate_stride,
    shift_stride,
    scale_stride,
    eps,
    SPLITS: tl.constexpr,
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
            x + start,
            y + start,
            gate + image * gate_stride,
            bias,
            tl.cast(total, tl.int64) * D,
            residual + start,
            SPLITS,
            D,
            BLOCK,
        )
        store_row(out + start, normalize(values, eps, D, BLOCK) * factors + shifts, D, BLOCK)


def gate_residual_layernorm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x, y (N, T, D) contiguous, gate, shift, scale (N, D) → (r, modulated norm of r).

    r is x + gate · y. ``out`` holds both results, each (N, T, D). There, r may be x or y, and the
    norm may be y.

    With ``bias`` (D,), y is (S, N, T, D) float32, the partial sums of a product that is split over
    its inputs. The S sums are added up in order, then the bias is added, in float32 and without
    rounding before the gate. A result may then be x, but not y.
    """
    residual, normed = (torch.empty_like(x), torch.empty_like(x)) if out is None else out
    tensors = (x, y, gate, shift, scale, residual, normed, bias)
    strides = gate.stride(0), shift.stride(0), scale.stride(0)
    launch_rows(
        _gate_residual_layernorm_modulate_kernel, tensors, (*strides, eps),
        columns=40 if bias is None else 20, SPLITS=1 if bias is None else len(y),
    )  # fmt: skip
    return residual, normed
