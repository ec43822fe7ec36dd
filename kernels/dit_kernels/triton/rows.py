"""Device functions shared by the kernels that take whole rows of D elements.

A row is one tile of BLOCK columns, the next power of two; columns past D hold 0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_row(pointer, D: tl.constexpr, BLOCK: tl.constexpr):
    """The row at ``pointer`` as float32 (BLOCK,)."""
    columns = tl.arange(0, BLOCK)
    return tl.load(pointer + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def store_row(pointer, values, D: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(pointer + columns, values.to(pointer.dtype.element_ty), mask=columns < D)


@triton.jit
def normalize(
    values,  # (BLOCK,) float32
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """LayerNorm over the D columns without weight and bias; the mean is subtracted first."""
    centered = values - tl.sum(values, 0) * (1.0 / D)
    centered = tl.where(tl.arange(0, BLOCK) < D, centered, 0.0)
    return centered * tl.rsqrt(tl.sum(centered * centered, 0) * (1.0 / D) + eps)


@triton.jit
def quantize(
    values,  # (BLOCK,) float32
    LIMIT: tl.constexpr,
    INTEGER: tl.constexpr,
    EXACT: tl.constexpr,
):
    """(codes, scale) of a row: its largest magnitude becomes the code LIMIT.

    Integer codes are whole numbers; the code of NaN is 0. The scale is that of a magnitude of at
    least 1e-12, and NaN if the row has a NaN, whose bits are larger than those of any number.

    EXACT: the quotients are rounded correctly. This is needed for values as they come from memory:
    in bfloat16, values / scale can lie exactly between two codes. Values that were just computed in
    float32 do not need it.
    """
    bits = tl.abs(values).to(tl.int32, bitcast=True)
    peak = tl.max(bits, 0).to(tl.float32, bitcast=True)
    # Not tl.maximum, which would drop a NaN.
    scale = tl.div_rn(tl.where(peak < 1e-12, 1e-12, peak), LIMIT * 1.0)
    # One reciprocal per row. A quotient is at most two ulps above LIMIT and rounds to LIMIT, so no
    # clamp is needed.
    inverse = tl.div_rn(1.0, scale)
    codes = values * inverse
    if EXACT:  # Markstein 1990: corrected by the remainder
        codes = tl.fma(tl.fma(codes, -scale, values), inverse, codes)
    if INTEGER:
        # Half to even for numbers below 2²²: around 1.5 · 2²³, a float32 has no fraction.
        codes = tl.where(codes == codes, (codes + 12582912.0) - 12582912.0, 0.0)
    return codes, scale
