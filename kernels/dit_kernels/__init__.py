"""Fused operators of Diffusion Transformers: torch references, Triton and native CPU kernels."""

from dit_kernels.checks import Unavailable
from dit_kernels.dispatch import IMPLEMENTATIONS, available
from dit_kernels.linear import PackedLinear, linear, linear_gelu
from dit_kernels.operators import (
    attention,
    gate_residual,
    gate_residual_layernorm_modulate,
    groupnorm_silu,
    guided_step,
    layernorm_modulate,
    layernorm_modulate_quantize,
    quantize_rows,
)
from dit_kernels.quantized import QuantizedLinear

__all__ = [
    "IMPLEMENTATIONS",
    "PackedLinear",
    "QuantizedLinear",
    "Unavailable",
    "attention",
    "available",
    "gate_residual",
    "gate_residual_layernorm_modulate",
    "groupnorm_silu",
    "guided_step",
    "layernorm_modulate",
    "layernorm_modulate_quantize",
    "linear",
    "linear_gelu",
    "quantize_rows",
]
