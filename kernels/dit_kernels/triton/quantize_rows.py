"""Symmetric quantisation with one scale per row, to int8 or float8 e4m3."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.triton.launch import launch, row_tile
from dit_kernels.triton.rows import load_row, quantize, store_row


@triton.jit
def _quantize_rows_kernel(
    x,  # (R, D) contiguous
    codes,  # (R, D) contiguous
    scales,  # (R,)
    LIMIT: tl.constexpr,
    INTEGER: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    values = load_row(x + row * D, D, BLOCK)
    row_codes, row_scale = quantize(values, LIMIT, INTEGER, EXACT=True)
    tl.store(scales + row, row_scale)
    store_row(codes + row * D, row_codes, D, BLOCK)


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
    launch(
        _quantize_rows_kernel, scales.numel(), x, codes, scales,
        LIMIT=code_limit(dtype), INTEGER=dtype == torch.int8, **row_tile(x.shape[-1], columns=80),
    )  # fmt: skip
    return codes, scales
