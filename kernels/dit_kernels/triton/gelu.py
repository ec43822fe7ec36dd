"""tanh-GELU, elementwise: for products whose library has no such epilogue."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.triton.launch import launch

_BLOCK = 1024


@triton.jit
def tanh_gelu(x, EXACT: tl.constexpr):
    """½x(1 + tanh u) with u = √(2/π)(x + 0.044715x³), for float32 x.

    EXACT: accurate to float32's precision; otherwise to a few units in the last place of float32,
    with fewer instructions.
    """
    # The formula equals x · sigmoid(2u), and exp(−2u) is computed as a power of two.
    denominator = 1 + tl.exp2(x * (-2.302208198 - 0.1029432397 * (x * x)))
    if EXACT:
        return x / denominator
    root = tl.rsqrt(denominator)
    return x * root * root


@triton.jit
def _gelu_kernel(
    x,  # contiguous
    out,  # contiguous
    total,  # number of elements
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    mask = first + offsets < total
    value = tl.load(x + first + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(
        out + first + offsets, tanh_gelu(value, EXACT=True).to(out.dtype.element_ty), mask=mask
    )


def gelu(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x of any shape, contiguous; ``out`` may be x."""
    if out is None:
        out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    launch(_gelu_kernel, -(-x.numel() // _BLOCK), x, out, x.numel(), BLOCK=_BLOCK, num_warps=4)
    return out
