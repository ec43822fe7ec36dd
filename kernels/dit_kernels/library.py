"""The operators as torch.library operators, so that torch.compile and torch.export keep each whole.

Eager calls never come through here: the dispatcher costs more than some of the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_kernels import operators
from dit_kernels.cpu import product as native_product


@torch.library.custom_op("dit_kernels::layernorm_modulate", mutates_args=())
def layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, impl: str) -> Tensor:
    return operators.layernorm_modulate(x, shift, scale, eps, impl=impl)


@layernorm_modulate.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float, impl: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("dit_kernels::gate_residual_layernorm_modulate", mutates_args=())
def gate_residual_layernorm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, impl: str
) -> tuple[Tensor, Tensor]:
    return operators.gate_residual_layernorm_modulate(x, y, gate, shift, scale, eps, impl=impl)


@gate_residual_layernorm_modulate.register_fake
def _(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, impl: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("dit_kernels::gate_residual", mutates_args=())
def gate_residual(x: Tensor, y: Tensor, gate: Tensor, impl: str) -> Tensor:
    return operators.gate_residual(x, y, gate, impl=impl)


@gate_residual.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor, impl: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("dit_kernels::attention", mutates_args=())
def attention(qkv: Tensor, num_heads: int, impl: str) -> Tensor:
    return operators.attention(qkv, num_heads, impl=impl)


@attention.register_fake
def _(qkv: Tensor, num_heads: int, impl: str) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


@torch.library.custom_op("dit_kernels::groupnorm_silu", mutates_args=())
def groupnorm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, impl: str
) -> Tensor:
    return operators.groupnorm_silu(x, groups, weight, bias, eps, impl=impl)


@groupnorm_silu.register_fake
def _(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, impl: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.custom_op("dit_kernels::guided_step", mutates_args=())
def guided_step(
    tokens: Tensor,
    z: Tensor,
    x0_before: Tensor,
    noise: Tensor,
    guidance_scale: Tensor,
    coefficients: Tensor,
    guided_channels: int,
    patch_size: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return operators.guided_step(
        tokens, z, x0_before, noise, guidance_scale, coefficients, guided_channels, patch_size,
        impl=impl,
    )  # fmt: skip


@guided_step.register_fake
def _(
    tokens: Tensor,
    z: Tensor,
    x0_before: Tensor,
    noise: Tensor,
    guidance_scale: Tensor,
    coefficients: Tensor,
    guided_channels: int,
    patch_size: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), torch.empty_like(z)


@torch.library.custom_op("dit_kernels::layernorm_modulate_quantize", mutates_args=())
def layernorm_modulate_quantize(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype, impl: str
) -> tuple[Tensor, Tensor]:
    return operators.layernorm_modulate_quantize(x, shift, scale, eps, dtype, impl=impl)


@layernorm_modulate_quantize.register_fake
def _(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype, impl: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:2], dtype=torch.float32)


@torch.library.custom_op("dit_kernels::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor, dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor]:
    return operators.quantize_rows(x, dtype, impl=impl)


@quantize_rows.register_fake
def _(x: Tensor, dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("dit_kernels::packed_linear", mutates_args=())
def packed_linear(x: Tensor, packed: Tensor, bias: Tensor, m: int, gelu: bool) -> Tensor:
    return native_product.linear(x, packed, bias, m, gelu)


@packed_linear.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor, m: int, gelu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], m)


@torch.library.custom_op("dit_kernels::packed_linear_int8", mutates_args=())
def packed_linear_int8(
    codes: Tensor,
    scales: Tensor,
    packed: Tensor,
    weight_scales: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    gelu: bool,
) -> Tensor:
    return native_product.linear_int8(codes, scales, packed, weight_scales, bias, dtype, gelu)


@packed_linear_int8.register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    packed: Tensor,
    weight_scales: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    gelu: bool,
) -> Tensor:
    return codes.new_empty(codes.shape[0], weight_scales.shape[0], dtype=dtype)
