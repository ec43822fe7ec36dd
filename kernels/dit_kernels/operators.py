"""The public operators: each validates, chooses an implementation and calls it.

Shape letters: N images, T tokens, D width, H heads, d = D/H. ``impl`` is "auto", "reference",
"triton" or "native"; for attention also "triton-tma", "cudnn" and "flash" (torch's own kernels) and
"flash-attn" (the package). An implementation that was asked for by name runs or raises
`Unavailable`; bad arguments are a ValueError of one line.

Each is also registered with torch.library, so that torch.compile and torch.export keep a call as
one node, ``dit_kernels::<name>``. Eager calls do not take this path: torch's dispatcher costs
more than some of the kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from dit_kernels import checks
from dit_kernels.checks import Unavailable
from dit_kernels.dispatch import KERNELS, Run, implementation, wants_gradient

F = TypeVar("F", bound=Run)


def _registered(like: Run) -> Callable[[F], F]:
    """Register an operator under its function's name.

    Args:
        like: (the operator's arguments) → empty tensors like its results, for tracing.
    """

    def register(run: F) -> F:
        operator = torch.library.custom_op(f"dit_kernels::{run.__name__}", run, mutates_args=())
        operator.register_fake(like)
        node = getattr(torch.ops.dit_kernels, run.__name__)

        @functools.wraps(run)
        def public(*arguments: Any, **options: Any) -> Any:
            call = node if torch.compiler.is_compiling() else run
            return call(*arguments, **options)

        return cast(F, public)

    return register


def _like_first(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(x)


def _like_first_twice(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _codes_like(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


@_registered(_like_first)
def layernorm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, impl: str = "auto"
) -> Tensor:
    """adaLN (DiT paper, section 3.2): LayerNorm(x) · (1 + scale) + shift.

    x: (N, T, D) contiguous; shift, scale: (N, D) in x's dtype or float32, with rows at any stride,
    such as views that ``chunk(6)`` makes. Returns (N, T, D).
    """
    checks.check_tokens(x, eps=eps, shift=shift, scale=scale)
    return _run("layernorm_modulate", impl, x, shift, scale, eps)


@_registered(_like_first_twice)
def gate_residual_layernorm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6,
    *, impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The end of one branch and the start of the next: r = x + gate · y, and adaLN of r.

    x, y: (N, T, D) contiguous; gate, shift, scale: (N, D). Returns (r, its modulated norm).
    """
    checks.check_tokens(x, y, eps, gate=gate, shift=shift, scale=scale)
    return _run("gate_residual_layernorm_modulate", impl, x, y, gate, shift, scale, eps)


@_registered(_like_first)
def gate_residual(x: Tensor, y: Tensor, gate: Tensor, *, impl: str = "auto") -> Tensor:
    """x + gate · y for x, y (N, T, D) contiguous and gate (N, D)."""
    checks.check_tokens(x, y, gate=gate)
    return _run("gate_residual", impl, x, y, gate)


@_registered(lambda qkv, *_, **__: qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3))
def attention(qkv: Tensor, num_heads: int, *, impl: str = "auto") -> Tensor:
    """Softmax(q kᵀ · d^-½) v straight from the packed projection (Dao et al. 2022's algorithm).

    qkv: (N, T, 3·H·d) contiguous, d a multiple of 8 up to 128. Returns (N, T, H·d).
    """
    checks.check_qkv(qkv, num_heads)
    return _run("attention", impl, qkv, num_heads)


@_registered(lambda x, *_, **__: torch.empty_like(x, memory_format=torch.channels_last))
def groupnorm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, impl: str = "auto"
) -> Tensor:
    """SiLU(GroupNorm(x)) for x (N, C, H, W) in channels-last memory, which the result has too.

    weight, bias: (C,), in x's dtype or float32.
    """
    checks.check_images(x, groups, weight, bias, eps)
    return _run("groupnorm_silu", impl, x, groups, weight, bias, eps)


@_registered(lambda tokens, z, *_, **__: _like_first_twice(z))
def guided_step(
    tokens: Tensor, z: Tensor, x0_before: Tensor, noise: Tensor, guidance_scale: Tensor,
    coefficients: Tensor, guided_channels: int, patch_size: int, *, impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """From the final layer's output to the next latents: unpatchify, guidance, sampler update.

    With ε the guided prediction and (a, b, c₁ … c₄, low, high, s) the ``coefficients``:
    x₀ = a·z + b·ε and z′ = c₁·x₀ + c₂·z + c₃·ε + c₄·x₀_before + σ·noise, where σ = s or, with
    a learned variance v, s·exp(½(low + ½(v + 1)(high − low))) (Nichol & Dhariwal 2021, eq. 15).
    s = 0 leaves the noise out. ``dit_engine.sampling.coefficients`` has those of each sampler.

    Args:
        tokens: (2N, T, p·p·C_out), the conditional rows first, or (N, …) for no guidance.
        z, x0_before, noise: (N, C, S, S) float32; what is in noise does not matter where σ = 0.
        guidance_scale: (N,) float32; an image at exactly 1 is left unguided.
        coefficients: (9,) float32, on the device.
        guided_channels: how many latent channels, from the first on, are guided; 3 as published.

    Returns:
        (z′, x₀), each (N, C, S, S) float32.
    """
    arguments = (tokens, z, x0_before, noise, guidance_scale, coefficients, guided_channels,
                 patch_size)  # fmt: skip
    checks.check_guided_step(*arguments)
    return _run("guided_step", impl, *arguments)


@_registered(lambda x, shift, scale, eps=1e-6, dtype=torch.int8, **_: _codes_like(x, dtype))
def layernorm_modulate_quantize(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, dtype: torch.dtype = torch.int8,
    *, impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`layernorm_modulate`, quantised symmetrically with one scale per token.

    Returns codes (N, T, D) of ``dtype`` (int8 or float8_e4m3fn) and float32 scales (N, T):
    the modulated norm is about codes · scale.
    """
    checks.check_tokens(x, eps=eps, shift=shift, scale=scale)
    checks.check_codes(dtype)
    impl = _with_codes(impl, dtype, x.device)
    return _run("layernorm_modulate_quantize", impl, x, shift, scale, eps, dtype)


@_registered(lambda x, dtype=torch.int8, **_: _codes_like(x, dtype))
def quantize_rows(
    x: Tensor, dtype: torch.dtype = torch.int8, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """x, quantised symmetrically with one scale per row.

    x: (…, D) contiguous. Returns codes (…, D) of ``dtype`` (int8 or float8_e4m3fn) and float32
    scales (…): x is about codes · scale.
    """
    checks.check_rows(x)
    checks.check_codes(dtype)
    return _run("quantize_rows", _with_codes(impl, dtype, x.device), x, dtype)


def _run(operator: str, impl: str, *arguments: Any) -> Any:
    """The results of the implementation for these arguments, the first of which is a tensor.

    Only the reference has a backward pass: "auto" takes it where a gradient is needed, and a named
    kernel is then refused, because it would drop the gradient.
    """
    if wants_gradient(*(tensor for tensor in arguments if isinstance(tensor, Tensor))):
        if impl in KERNELS:
            raise Unavailable(
                f"impl {impl!r}: {operator} has no backward pass there; use impl 'reference', or "
                "torch.no_grad() where no gradient is needed"
            )
        impl = "reference" if impl == "auto" else impl
    return implementation(operator, impl, arguments[0].device)(*arguments)


def _with_codes(impl: str, dtype: torch.dtype, device: torch.device) -> str:
    """``impl``; but for "auto" the reference, if no kernel makes codes of ``dtype``."""
    if impl != "auto" or not dtype.is_floating_point:
        return impl
    fused = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    return impl if fused else "reference"
