"""The native matrix products, with weights packed once and bias, tanh-GELU and int8's scales fused.

They are offered where they beat oneDNN: on processors with AVX512-BF16 and without AMX. The order
in which an output's products are added depends on K alone, so a row's bits depend neither on the
rows beside it nor on the number of threads. torch.compile and torch.export keep each as one node.
Letters: R rows, K inputs, M outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_kernels.cpu import loader
from dit_kernels.cpu.operators import Out, result
from dit_kernels.cpu.recording import call

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


def why_not(dtype: torch.dtype) -> str | None:
    """Why there is no native product with weights of ``dtype``, or None if there is one."""
    if (reason := loader.why_not()) is not None:
        return reason
    if dtype not in (torch.float32, torch.bfloat16, torch.int8):
        return f"native products are of float32, bfloat16 and int8, not of {dtype}"
    if (isa := loader.isa()) != "avx512_bf16":
        return f"native products are for AVX512-BF16 without AMX; this machine runs {isa}"
    return None


def pack(weight: Tensor) -> Tensor:
    """weight (M, K) of float32, bfloat16 or int8 → its packed bytes, uint8, 64-byte aligned."""
    m, k = weight.shape
    size = loader.loaded().dit_packed_bytes(m, k, loader.DTYPE_CODES[weight.dtype])
    if size < 0:
        raise ValueError(f"weight of shape {tuple(weight.shape)}: no native product takes it")
    memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % ALIGNMENT
    packed = memory[start : start + size]
    call("dit_pack_weight", weight.contiguous(), packed, m, k, weight.dtype)
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor, m: int, gelu: bool, out: Out = None) -> Tensor:
    """x (…, K), packed weight, float32 bias (M,) → (…, M) in x's dtype."""
    if torch.compiler.is_compiling():
        return _whole_linear(x, packed, bias, m, gelu)
    out = result(out, (*x.shape[:-1], m), x.dtype)
    k = x.shape[-1]
    call("dit_linear", x.contiguous(), packed, bias, out, x.numel() // k, k, m, x.dtype, gelu)
    return out


def linear_int8(
    codes: Tensor, scales: Tensor, packed: Tensor, weight_scales: Tensor, bias: Tensor,
    dtype: torch.dtype, gelu: bool, out: Out = None,
) -> Tensor:  # fmt: skip
    """codes (R, K) uint8 with scales (R,), packed int8 weight with scales (M,), float32 bias (M,)
    → (R, M) of ``dtype``, float32 or bfloat16."""
    if torch.compiler.is_compiling():
        return _whole_linear_int8(codes, scales, packed, weight_scales, bias, dtype, gelu)
    (r, k), m = codes.shape, len(weight_scales)
    out = result(out, (r, m), dtype)
    call("dit_linear_int8", codes, scales, packed, weight_scales, bias, out, r, k, m, dtype, gelu)
    return out


# ``out`` is left out: an operator's result must be memory of its own.
_whole_linear = torch.library.custom_op(
    "dit_kernels::packed_linear", linear, mutates_args=(),
    schema="(Tensor x, Tensor packed, Tensor bias, int m, bool gelu) -> Tensor",
)  # fmt: skip
_whole_linear.register_fake(lambda x, packed, bias, m, gelu: x.new_empty(*x.shape[:-1], m))
_whole_linear_int8 = torch.library.custom_op(
    "dit_kernels::packed_linear_int8", linear_int8, mutates_args=(),
    schema="(Tensor codes, Tensor scales, Tensor packed, Tensor weight_scales, Tensor bias, "
           "ScalarType dtype, bool gelu) -> Tensor",
)  # fmt: skip
_whole_linear_int8.register_fake(
    lambda codes, scales, packed, weight_scales, bias, dtype, gelu: codes.new_empty(
        len(codes), len(weight_scales), dtype=dtype
    )
)
