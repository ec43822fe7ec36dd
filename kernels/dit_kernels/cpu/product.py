"""The native matrix products: weights packed once, bias and tanh-GELU fused, int8 with its scales.

They are offered where they beat oneDNN: processors with AVX512-BF16 and without AMX. The order in
which an output's products are added depends on K alone, so a row's bits depend neither on the rows
beside it nor on the threads. Letters: R rows, K inputs, M outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_kernels.cpu import operators as native
from dit_kernels.cpu.checks import result
from dit_kernels.cpu.loader import DTYPES, load

CODES = 4  # int8 weights, beside DTYPES
ALIGNMENT = 64


def why_not(dtype: torch.dtype) -> str | None:
    """Why there is no native product with weights of ``dtype``, or None."""
    if (reason := native.why_not()) is not None:
        return reason
    if dtype not in (torch.float32, torch.bfloat16, torch.int8):
        return f"native products are of float32, bfloat16 and int8, not of {dtype}"
    if native.isa() != "avx512_bf16":
        return f"native products are for AVX512-BF16 without AMX; this machine runs {native.isa()}"
    return None


def pack(weight: Tensor) -> Tensor:
    """weight (M, K) of float32, bfloat16 or int8 → its packed bytes, uint8, 64-byte aligned."""
    library = load()[0]
    assert library is not None
    weight = weight.contiguous()  # kept while its address is in use
    m, k = weight.shape
    code = CODES if weight.dtype == torch.int8 else DTYPES[weight.dtype]
    size = library.dit_packed_bytes(m, k, code)
    if size < 0:
        raise ValueError(f"weight of shape {tuple(weight.shape)}: no native product takes it")
    memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % ALIGNMENT
    packed = memory[start : start + size]
    native.call("dit_pack_weight", weight.data_ptr(), packed.data_ptr(), m, k, code)
    return packed


def linear(
    x: Tensor, packed: Tensor, bias: Tensor, m: int, gelu: bool, out: Tensor | None = None
) -> Tensor:
    """x (…, K), packed weight, float32 bias (M,) → (…, M) in x's dtype."""
    x = x.contiguous()
    out = result("out", out, (*x.shape[:-1], m), x.dtype)
    k = x.shape[-1]
    native.call("dit_linear", x.data_ptr(), packed.data_ptr(), bias.data_ptr(), out.data_ptr(),
                x.numel() // k, k, m, DTYPES[x.dtype], int(gelu))  # fmt: skip
    return out


def linear_int8(
    codes: Tensor,
    scales: Tensor,
    packed: Tensor,
    weight_scales: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    gelu: bool,
    out: Tensor | None = None,
) -> Tensor:
    """codes (R, K) uint8 with scales (R,), packed int8 weight with scales (M,), float32 bias (M,)
    → (R, M) of ``dtype``, float32 or bfloat16."""
    r, k = codes.shape
    m = len(weight_scales)
    out = result("out", out, (r, m), dtype)
    native.call("dit_linear_int8", codes.data_ptr(), scales.data_ptr(), packed.data_ptr(),
                weight_scales.data_ptr(), bias.data_ptr(), out.data_ptr(), r, k, m, DTYPES[dtype],
                int(gelu))  # fmt: skip
    return out
