"""Symmetric quantisation with one scale per row, to int8 or float8 e4m3."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.triton.launch import launch, row_tiles
from dit_kernels.triton.rows import encode, larger, largest, load_rows, row_scale, store_rows


@triton.jit
def _quantize_rows_kernel(
    x,  # (R, D) contiguous
    codes,  # (R, D) contiguous
    scales,  # (R,)
    total,  # R
    LIMIT: tl.constexpr,
    INTEGER: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    valid = first + rows < total
    x += first * D
    codes += first * D
    head = load_rows(x, rows, valid, 0, HEAD, D)
    tail = head
    peak = largest(head)
    if TAIL > 0:
        tail = load_rows(x, rows, valid, HEAD, TAIL, D)
        peak = larger(peak, largest(tail))
    scale = row_scale(peak, LIMIT)
    tl.store(scales + first + rows, scale, mask=valid)
    store_rows(codes, encode(head, scale, INTEGER), rows, valid, 0, HEAD, D)
    if TAIL > 0:
        store_rows(codes, encode(tail, scale, INTEGER), rows, valid, HEAD, TAIL, D)


def check_codes_on(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError where the GPU has no instruction for these codes."""
    if dtype == torch.int8 or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise ValueError(
            f"dtype {dtype} needs compute capability 8.9 or later, {device} has "
            f"{capability[0]}.{capability[1]}: choose torch.int8"
        )


def code_limit(dtype: torch.dtype) -> float:
    """The largest code in magnitude."""
    return 127.0 if dtype == torch.int8 else torch.finfo(dtype).max


def new_codes(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory for the codes of x (…, D) and for their scales (…)."""
    return torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


def quantize_rows(
    x: Tensor, dtype: torch.dtype, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """x (…, D) contiguous → codes (…, D) of ``dtype`` and float32 scales (…): x ≈ codes · scale.

    Raises:
        ValueError: float8 on a GPU older than compute capability 8.9.
    """
    check_codes_on(x.device, dtype)
    codes, scales = out or new_codes(x, dtype)
    if x.numel() == 0:
        return codes, scales
    head, tail, rows, num_warps = row_tiles(x.shape[-1])
    total = scales.numel()
    launch(
        _quantize_rows_kernel, -(-total // rows),
        x, codes, scales, total, LIMIT=code_limit(dtype), INTEGER=dtype == torch.int8,
        D=x.shape[-1], HEAD=head, TAIL=tail, ROWS=rows, num_warps=num_warps,
    )  # fmt: skip
    return codes, scales
