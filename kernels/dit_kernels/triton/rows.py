"""Device functions shared by the kernels that take whole rows of (N, T, D).

A row of D elements is held as a tile of HEAD columns and, if TAIL is not 0, one of TAIL columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(
    pointer,  # of one image, (T, D)
    rows,  # (ROWS,)
    valid,  # (ROWS,) rows < T
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
):
    """Columns START to START + WIDTH as float32 (ROWS, WIDTH); 0 outside the tensor."""
    columns = START + tl.arange(0, WIDTH)
    mask = valid[:, None]
    if START + WIDTH > D:
        mask = mask & (columns < D)[None, :]
    offsets = rows[:, None] * D + columns[None, :]
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(
    pointer,
    values,  # (ROWS, WIDTH)
    rows,
    valid,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
):
    columns = START + tl.arange(0, WIDTH)
    mask = valid[:, None]
    if START + WIDTH > D:
        mask = mask & (columns < D)[None, :]
    offsets = rows[:, None] * D + columns[None, :]
    tl.store(pointer + offsets, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_columns(
    pointer,  # (D,)
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
):
    """Columns START to START + WIDTH of one vector as float32 (1, WIDTH)."""
    columns = START + tl.arange(0, WIDTH)
    if START + WIDTH > D:
        values = tl.load(pointer + columns, mask=columns < D, other=0.0)
    else:
        values = tl.load(pointer + columns)
    return values.to(tl.float32)[None, :]


@triton.jit
def center(values, mean, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """values − mean, and 0 in the columns past D."""
    centered = values - mean[:, None]
    if START + WIDTH > D:
        columns = START + tl.arange(0, WIDTH)
        centered = tl.where((columns < D)[None, :], centered, 0.0)
    return centered


@triton.jit
def normalize(
    head,  # (ROWS, HEAD) float32
    tail,  # (ROWS, TAIL), or anything when TAIL is 0
    eps,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    D: tl.constexpr,
):
    """LayerNorm over the D columns, mean first: (head, tail) normalised."""
    total = tl.sum(head, 1)
    if TAIL > 0:
        total += tl.sum(tail, 1)
    mean = total / D
    head = center(head, mean, 0, HEAD, D)
    squares = tl.sum(head * head, 1)
    if TAIL > 0:
        tail = center(tail, mean, HEAD, TAIL, D)
        squares += tl.sum(tail * tail, 1)
    inverse = tl.rsqrt(squares / D + eps)[:, None]
    head = head * inverse
    if TAIL > 0:
        tail = tail * inverse
    return head, tail


@triton.jit
def modulate(
    normed,  # (ROWS, WIDTH)
    shift,  # of one image, (D,)
    scale,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
):
    """normed · (1 + scale) + shift."""
    factor = 1 + load_columns(scale, START, WIDTH, D)
    return normed * factor + load_columns(shift, START, WIDTH, D)


@triton.jit
def largest(values):
    """max |values| of each row, NaN if it has one: as bits, NaN is larger than every number."""
    bits = tl.abs(values).to(tl.int32, bitcast=True)
    return tl.max(bits, 1).to(tl.float32, bitcast=True)


@triton.jit
def larger(a, b):
    """The larger of two magnitudes, NaN if there is one."""
    bits = tl.maximum(a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def round_half_even(values):
    """For |values| < 2²²: around 1.5 · 2²³, a float32 has no fraction."""
    return (values + 12582912.0) - 12582912.0


@triton.jit
def row_scale(peak, LIMIT: tl.constexpr):
    """peak, at least 1e-12 unless NaN, divided by LIMIT."""
    # Not tl.maximum, which would drop a NaN.
    return tl.div_rn(tl.where(peak < 1e-12, 1e-12, peak), LIMIT * 1.0)


@triton.jit
def encode(values, scale, INTEGER: tl.constexpr):
    """values / scale, rounded to whole numbers for integer codes (NaN becomes 0).

    The correctly rounded quotient is at most one ulp above LIMIT, and rounds to LIMIT: no clamp.
    """
    codes = tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape))
    if INTEGER:
        codes = tl.where(codes == codes, round_half_even(codes), 0.0)
    return codes
