"""The public operators: each validates, chooses an implementation and calls it.

Shape letters: N images, T tokens, D width, H heads, d = D/H. ``impl`` is "auto", "reference",
"triton" or "native", for attention also "triton-tma"; a named one runs or raises `Unavailable`. Bad
arguments are a ValueError of one line. Under torch.compile and torch.export each call is one node,
``dit_kernels::<name>``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit_kernels import checks
from dit_kernels.dispatch import (
    KERNELS,
    Unavailable,
    implementation,
    wants_gradient,
    without_autocast,
)


def layernorm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, impl: str = "auto"
) -> Tensor:
    """adaLN (DiT paper, section 3.2): LayerNorm(x) · (1 + scale) + shift.

    x: (N, T, D) contiguous; shift, scale: (N, D), views of ``chunk(6)`` as they come, in x's
    dtype or float32. Returns (N, T, D).
    """
    if torch.compiler.is_compiling():
        return torch.ops.dit_kernels.layernorm_modulate(x, shift, scale, eps, impl)
    checks.check_tokens("x", x)
    checks.check_modulation(x, shift=shift, scale=scale)
    checks.check_eps(eps)
    return _chosen("layernorm_modulate", impl, x, shift, scale)(x, shift, scale, eps)


def gate_residual_layernorm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The end of one branch and the start of the next: r = x + gate · y, and adaLN of r.

    x, y: (N, T, D) contiguous; gate, shift, scale: (N, D). Returns (r, its modulated norm).
    """
    if torch.compiler.is_compiling():
        return torch.ops.dit_kernels.gate_residual_layernorm_modulate(
            x, y, gate, shift, scale, eps, impl
        )
    checks.check_tokens("x", x)
    checks.check_same("y", y, x)
    checks.check_modulation(x, gate=gate, shift=shift, scale=scale)
    checks.check_eps(eps)
    run = _chosen("gate_residual_layernorm_modulate", impl, x, y, gate, shift, scale)
    return run(x, y, gate, shift, scale, eps)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, *, impl: str = "auto") -> Tensor:
    """x + gate · y for x, y (N, T, D) contiguous and gate (N, D)."""
    if torch.compiler.is_compiling():
        return torch.ops.dit_kernels.gate_residual(x, y, gate, impl)
    checks.check_tokens("x", x)
    checks.check_same("y", y, x)
    checks.check_modulation(x, gate=gate)
    return _chosen("gate_residual", impl, x, y, gate)(x, y, gate)


def attention(qkv: Tensor, num_heads: int, *, impl: str = "auto") -> Tensor:
    """Softmax(q kᵀ · d^-½) v straight from the packed projection (Dao et al. 2022's algorithm).

    qkv: (N, T, 3·H·d) contiguous, d a multiple of 8 up to 128. Returns (N, T, H·d).
    """
    if torch.compiler.is_compiling():
        return torch.ops.dit_kernels.attention(qkv, num_heads, impl)
    checks.check_qkv(qkv, num_heads)
    return _chosen("attention", impl, qkv)(qkv, num_heads)


def groupnorm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, impl: str = "auto"
) -> Tensor:
    """SiLU(GroupNorm(x)) for x (N, C, H, W) in channels-last memory, which the result has too.

    weight, bias: (C,), in x's dtype or float32.
    """
    if torch.compiler.is_compiling():
        return torch.ops.dit_kernels.groupnorm_silu(x, groups, weight, bias, eps, impl)
    checks.check_images(x, groups, weight, bias)
    checks.check_eps(eps)
    return _chosen("groupnorm_silu", impl, x, weight, bias)(x, groups, weight, bias, eps)


def guided_step(
    tokens: Tensor,
    z: Tensor,
    x0_before: Tensor,
    noise: Tensor,
    guidance_scale: Tensor,
    coefficients: Tensor,
    guided_channels: int,
    patch_size: int,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """From the final layer's output to the next latents: unpatchify, guidance, sampler update.

    With ε the guided prediction and (a, b, c₁ … c₄, low, high, s) the ``coefficients``:
    x₀ = a·z + b·ε and z′ = c₁·x₀ + c₂·z + c₃·ε + c₄·x₀_before + σ·noise, where σ = s, or with a
    learned variance v s·exp(½(low + ½(v + 1)(high − low))) (Nichol & Dhariwal 2021, equation 15).
    s = 0 leaves the noise out. ``dit_engine.sampling.fused`` has each sampler's coefficients.

    Args:
        tokens: (2N, T, p·p·C_out), the conditional rows first, or (N, …) for no guidance.
        z, x0_before, noise: (N, C, S, S) float32; what is in noise does not matter where σ = 0.
        guidance_scale: (N,) float32; an image at exactly 1 is left unguided.
        coefficients: (9,) float32, on the device.
        guided_channels: the first so many latent channels are guided (3 as published).

    Returns:
        (z′, x₀), each (N, C, S, S) float32.
    """
    arguments = (tokens, z, x0_before, noise, guidance_scale, coefficients, guided_channels,
                 patch_size)  # fmt: skip
    if torch.compiler.is_compiling():
        return torch.ops.dit_kernels.guided_step(*arguments, impl)
    checks.check_guided_step(*arguments)
    inputs = (z, tokens, x0_before, noise, guidance_scale, coefficients)
    return _chosen("guided_step", impl, *inputs)(*arguments)


def layernorm_modulate_quantize(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    dtype: torch.dtype = torch.int8,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`layernorm_modulate`, quantised symmetrically with one scale a token.

    Returns codes (N, T, D) of ``dtype`` (int8 or float8_e4m3fn) and float32 scales (N, T):
    the modulated norm is about codes · scale.
    """
    if torch.compiler.is_compiling():
        return torch.ops.dit_kernels.layernorm_modulate_quantize(x, shift, scale, eps, dtype, impl)
    checks.check_tokens("x", x)
    checks.check_modulation(x, shift=shift, scale=scale)
    checks.check_eps(eps)
    checks.check_codes(dtype)
    impl = _with_codes(impl, dtype, x.device)
    run = _chosen("layernorm_modulate_quantize", impl, x, shift, scale)
    return run(x, shift, scale, eps, dtype)


def quantize_rows(
    x: Tensor, dtype: torch.dtype = torch.int8, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """x, quantised symmetrically with one scale a row.

    x: (…, D) contiguous. Returns codes (…, D) of ``dtype`` (int8 or float8_e4m3fn) and float32
    scales (…): x is about codes · scale.
    """
    if torch.compiler.is_compiling():
        return torch.ops.dit_kernels.quantize_rows(x, dtype, impl)
    checks.check_rows("x", x)
    checks.check_codes(dtype)
    return _chosen("quantize_rows", _with_codes(impl, dtype, x.device), x)(x, dtype)


def _chosen(operator: str, impl: str, *tensors: Tensor) -> Callable[..., Any]:
    """The implementation for these tensors, the first of which gives the device.

    Only the reference has a backward pass: "auto" takes it where a gradient is wanted, and a named
    kernel is refused rather than dropping the gradient.
    """
    if wants_gradient(*tensors):
        if impl in KERNELS:
            raise Unavailable(
                f"impl {impl!r}: {operator} has no backward pass there; use impl 'reference', or "
                "torch.no_grad() where no gradient is needed"
            )
        if impl == "auto":
            impl = "reference"
    run = implementation(operator, impl, tensors[0].device)
    return without_autocast(run) if run.__module__.endswith("reference") else run


def _with_codes(impl: str, dtype: torch.dtype, device: torch.device) -> str:
    """``impl``, with the reference for "auto" where no kernel makes codes of ``dtype``."""
    if impl != "auto" or not dtype.is_floating_point:
        return impl
    fused = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    return impl if fused else "reference"
