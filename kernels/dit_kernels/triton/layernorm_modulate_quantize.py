"""adaLN whose result is codes with one scale per token, for an int8 or fp8 linear."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.triton.launch import launch_rows
from dit_kernels.triton.quantize_rows import check_codes_on, code_limit, new_codes
from dit_kernels.triton.rows import (
    encode,
    larger,
    largest,
    load_rows,
    modulate,
    normalize,
    row_scale,
    store_rows,
)


@triton.jit
def _layernorm_modulate_quantize_kernel(
    x,  # (N, T, D) contiguous
    shift,  # (N, D), rows shift_stride apart
    scale,  # (N, D), rows scale_stride apart
    codes,  # (N, T, D) contiguous
    scales,  # (N, T) contiguous
    tokens,  # T
    blocks,  # programs per image
    shift_stride,
    scale_stride,
    eps,
    LIMIT: tl.constexpr,
    INTEGER: tl.constexpr,
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
    codes += image * tokens * D
    scales += image * tokens
    shift += image * shift_stride
    scale += image * scale_stride
    head = load_rows(x, rows, valid, 0, HEAD, D)
    tail = head
    if TAIL > 0:
        tail = load_rows(x, rows, valid, HEAD, TAIL, D)
    head, tail = normalize(head, tail, eps, HEAD, TAIL, D)
    head = modulate(head, shift, scale, 0, HEAD, D)
    peak = largest(head)
    if TAIL > 0:
        tail = modulate(tail, shift, scale, HEAD, TAIL, D)
        peak = larger(peak, largest(tail))
    row_scales = row_scale(peak, LIMIT)
    tl.store(scales + rows, row_scales, mask=valid)
    store_rows(codes, encode(head, row_scales, INTEGER), rows, valid, 0, HEAD, D)
    if TAIL > 0:
        store_rows(codes, encode(tail, row_scales, INTEGER), rows, valid, HEAD, TAIL, D)


def layernorm_modulate_quantize(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """x (N, T, D) contiguous, shift, scale (N, D) → codes (N, T, D), float32 scales (N, T).

    Raises:
        ValueError: float8 on a GPU older than compute capability 8.9.
    """
    check_codes_on(x.device, dtype)
    codes, scales = out or new_codes(x, dtype)
    launch_rows(
        _layernorm_modulate_quantize_kernel, (x, shift, scale, codes, scales),
        (shift.stride(0), scale.stride(0), eps),
        LIMIT=code_limit(dtype), INTEGER=dtype == torch.int8,
    )  # fmt: skip
    return codes, scales
