"""Softmax over rows of float32 scores; a program holds a whole row in registers."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.triton.launch import launch, power_of_two


@triton.jit
def _softmax_kernel(
    scores,  # (R, T) float32
    out,  # (R, T)
    factor,  # scale · log2(e)
    length,  # T
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    start = tl.program_id(0).to(tl.int64) * length
    values = tl.load(scores + start + column, mask=column < length, other=float("-inf"))
    values = tl.exp2((values - tl.max(values, 0)) * factor)
    values *= 1 / tl.sum(values, 0)
    tl.store(out + start + column, values.to(out.dtype.element_ty), mask=column < length)


def softmax(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """softmax(scale · scores) over the last dimension of contiguous float32 scores (…, T), in
    ``dtype``."""
    out = torch.empty_like(scores, dtype=dtype)
    if scores.numel() > 0:
        length = scores.shape[-1]
        block = power_of_two(length)
        launch(
            _softmax_kernel, scores.numel() // length, scores, out, scale * math.log2(math.e),
            length, BLOCK=block, num_warps=min(max(block // 512, 1), 16),
        )  # fmt: skip
    return out
