"""tanh-GELU and symmetric quantisation with one scale per row: between the products of an MLP."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.triton.gelu import tanh_gelu
from dit_kernels.triton.launch import launch, row_tile
from dit_kernels.triton.quantize_rows import check_codes_on, code_limit, new_codes
from dit_kernels.triton.rows import load_row, quantize, store_row


@triton.jit
def _gelu_quantize_rows_kernel(
    x,  # (R, D) contiguous
    codes,  # (R, D) contiguous
    scales,  # (R,)
    LIMIT: tl.constexpr,
    INTEGER: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    values = tanh_gelu(load_row(x + row * D, D, BLOCK), EXACT=False)
    row_codes, row_scale = quantize(values, LIMIT, INTEGER, EXACT=False)
    tl.store(scales + row, row_scale)
    store_row(codes + row * D, row_codes, D, BLOCK)


def gelu_quantize_rows(
    x: Tensor, dtype: torch.dtype, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """x (…, D) contiguous → codes (…, D) of ``dtype`` and float32 scales (…) of tanh-GELU(x).

    The GELU is not rounded before it is quantised.

    Raises:
        ValueError: float8 on a GPU older than compute capability 8.9.
    """
    check_codes_on(x.device, dtype)
    codes, scales = out or new_codes(x, dtype)
    if x.numel() == 0:
        return codes, scales
    launch(
        _gelu_quantize_rows_kernel, scales.numel(), x, codes, scales,
        LIMIT=code_limit(dtype), INTEGER=dtype == torch.int8, **row_tile(x.shape[-1], columns=80),
    )  # fmt: skip
    return codes, scales
