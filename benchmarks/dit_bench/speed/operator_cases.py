"""Every operator of dit_kernels at the shapes that matter: inputs, definition, opponents' form.

Letters as in `dit_kernels.reference`: N images, T tokens, D width, H heads; R rows of a product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_bench.ceilings import FP8, NAMES
from dit_engine.config import FAMILIES
from dit_engine.model import NORM_EPS, modulate
from dit_kernels import reference

TOKENS = 256
"""Of an image of 256 pixels."""
Inputs = Callable[[torch.device], tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """An operator at one shape.

    Attributes:
        operator: its name in dit_kernels.
        shape: for people.
        dtype: of x.
        inputs: device → arguments, the same at every call.
        reference: the definition; given float64 arguments it computes in float64.
        plain: what a plain torch model runs for it, in x's dtype.
        fusable: torch.compile is given the definition, else ``plain``: compiling a float32 product
            where the model has one in half precision would make an easy opponent.
        flops: of its matrix products, one multiply-add counted as two; 0 for memory-bound work.
        timed: timed after the check, or checked only.
        values: result → tensors to compare; the result's own by default.
        exact: (float64 arguments) → what ``values`` are compared with; ``reference`` by default.
    """

    operator: str
    shape: str
    dtype: torch.dtype
    inputs: Inputs
    reference: Callable[..., Any]
    plain: Callable[..., Any]
    fusable: bool = True
    flops: int = 0
    timed: bool = False
    values: Callable[[Any], tuple[Tensor, ...]] | None = None
    exact: Callable[..., Any] | None = None


def all_cases(device: torch.device) -> list[Case]:
    """In the order of their worth, should time run out: XL/2 for a full batch (CUDA only) and for
    one image, each operator's shapes together; the other widths and dtypes, ragged, checked only.
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    t, (_, d, heads) = TOKENS, FAMILIES["XL"]
    cases = block_cases(2, t, d, heads, bf16, timed=True) + vae_cases(bf16, 1, timed=True)
    if device.type == "cuda":
        full = block_cases(64, t, d, heads, bf16, timed=True) + vae_cases(bf16, 8, timed=True)
        cases = [case for pair in zip(full, cases, strict=True) for case in pair]
    for name, tokens, n, dtype in (
        ("XL", 37, 3, bf16), ("XL", 37, 2, fp16), ("XL", 100, 2, fp32), ("L", 1000, 1, bf16),
        ("B", 1, 5, bf16), ("S", 1024, 1, bf16), ("S", 255, 2, fp32),
    ):  # fmt: skip
        cases += block_cases(n, tokens, FAMILIES[name][1], FAMILIES[name][2], dtype)
    cases.append(_layernorm_modulate(2, t, d, bf16, modulation=fp32))
    cases += [_groupnorm(2, 64, 7, bf16), _groupnorm(1, 128, 13, fp32), _guided(3, 8, bf16, False)]
    # fp8 is CUDA's alone; float16 and products of int8 are left to one of the two.
    if device.type == "cuda":
        return [case for case in cases if case.operator != "linear_int8"]
    return [
        case for case in cases if case.dtype != fp16 and case.operator != "linear_fp8"
        and not case.shape.endswith("to fp8")
    ]  # fmt: skip


def block_cases(
    n: int, t: int, d: int, heads: int, dtype: torch.dtype, *, timed: bool = False
) -> list[Case]:
    """The operators of a DiT block, of width ``d``, and of the sampler's step."""
    shape, x, vectors = f"N={n} T={t} D={d}", (n, t, d), (n, 6 * d)
    cases = [
        _layernorm_modulate(n, t, d, dtype, timed=timed),
        Case("gate_residual_layernorm_modulate", shape, dtype,
             _drawn(lambda x, y, m: (x, y, *m.chunk(6, dim=1)[:3], NORM_EPS), dtype, x, x, vectors),
             reference.gate_residual_layernorm_modulate, _plain_gate_norm, timed=timed),
        Case("gate_residual", shape, dtype,
             _drawn(lambda x, y, m: (x, y, m.chunk(6, dim=1)[0]), dtype, x, x, vectors),
             reference.gate_residual, lambda x, y, gate: x + gate.unsqueeze(1) * y, timed=timed),
        Case("attention", f"N={n} T={t} H={heads} d={d // heads}", dtype,
             _drawn(lambda qkv: (qkv, heads), dtype, (n, t, 3 * d)), reference.attention,
             plain_attention, fusable=False, flops=4 * n * t * t * d, timed=timed),
    ]  # fmt: skip
    for codes in (torch.int8, FP8):
        quantize = reference.layernorm_modulate_quantize
        cases += [
            # Against the norm itself and not its quantised form, where a tie may go either way.
            Case("layernorm_modulate_quantize", f"{shape} to {NAMES[codes]}", dtype,
                 _drawn(lambda x, m, c=codes: (x, *m.chunk(6, dim=1)[:2], NORM_EPS, c), dtype, x,
                        vectors),
                 quantize, quantize, timed=timed, values=_dequantized,
                 exact=lambda x, shift, scale, eps, _: reference.layernorm_modulate(
                     x, shift, scale, eps)),
            Case("quantize_rows", f"{shape} to {NAMES[codes]}", dtype,
                 _drawn(lambda x, c=codes: (x, c), dtype, x), reference.quantize_rows,
                 reference.quantize_rows, timed=timed, values=_dequantized, exact=lambda x, _: x),
        ]  # fmt: skip
    if timed:
        rows = n * t
        cases += [
            _linear("linear", rows, d, 3 * d, dtype),
            _linear("linear_gelu", rows, d, 4 * d, dtype),
            _linear("linear", rows, 4 * d, d, dtype),
            *(
                _quantized_linear(operator, rows, *widths, dtype, codes)
                for operator, codes in (("linear_int8", torch.int8), ("linear_fp8", FP8))
                for widths in ((d, 3 * d), (d, 4 * d), (4 * d, d))
            ),
            _guided(max(1, n // 2), 32, dtype, True, timed=True),
        ]
    return cases


def vae_cases(dtype: torch.dtype, n: int, *, timed: bool) -> list[Case]:
    """Norms of Stable Diffusion's VAE decoder at 256 pixels."""
    return [_groupnorm(n, 512, 32, dtype, timed=timed), _groupnorm(n, 128, 256, dtype, timed=timed)]


def plain_attention(qkv: Tensor, num_heads: int) -> Tensor:
    n, t, width = qkv.shape
    q, k, v = qkv.view(n, t, 3, num_heads, -1).permute(2, 0, 3, 1, 4)  # each (N, H, T, d)
    y = F.scaled_dot_product_attention(q, k, v)  # (N, H, T, d)
    return y.transpose(1, 2).reshape(n, t, width // 3)


def _drawn(
    arguments: Callable[..., tuple[Any, ...]], dtype: torch.dtype, *shapes: tuple[int, ...]
) -> Inputs:
    """Inputs that ``arguments`` makes of normal tensors of these shapes."""

    def inputs(device: torch.device) -> tuple[Any, ...]:
        draw = torch.Generator(device).manual_seed(0)
        tensors = (torch.randn(shape, generator=draw, device=device) for shape in shapes)
        return arguments(*(tensor.to(dtype) for tensor in tensors))

    return inputs


def _layernorm_modulate(
    n: int, t: int, d: int, dtype: torch.dtype, *,
    modulation: torch.dtype | None = None, timed: bool = False,
) -> Case:  # fmt: skip
    def plain(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], eps=eps)
        return modulate(normed, shift.to(x.dtype), scale.to(x.dtype))

    inputs = _drawn(
        lambda x, m: (x, *m.to(modulation or dtype).chunk(6, dim=1)[:2], NORM_EPS), dtype,
        (n, t, d), (n, 6 * d),
    )  # fmt: skip
    shape = f"N={n} T={t} D={d}" + (" fp32 modulation" if modulation else "")
    definition = reference.layernorm_modulate
    return Case("layernorm_modulate", shape, dtype, inputs, definition, plain, timed=timed)


def _plain_gate_norm(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x = x + gate.unsqueeze(1) * y
    return x, modulate(F.layer_norm(x, x.shape[-1:], eps=eps), shift, scale)


def _dequantized(result: tuple[Tensor, Tensor]) -> tuple[Tensor]:
    codes, scales = result
    return (codes.double() * scales.double().unsqueeze(-1),)


def _linear(operator: str, rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> Case:
    def gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    made = _drawn(
        lambda weight, x, bias: (x, weight * inputs**-0.5, bias), dtype,
        (outputs, inputs), (rows, inputs), (outputs,),
    )  # fmt: skip
    plain = gelu if operator == "linear_gelu" else F.linear
    return Case(operator, f"R={rows} {inputs}→{outputs}", dtype, made, getattr(reference, operator),
                plain, False, 2 * rows * inputs * outputs, timed=True)  # fmt: skip


def _quantized_linear(
    operator: str, rows: int, inputs: int, outputs: int, dtype: torch.dtype, codes: torch.dtype
) -> Case:
    """Arguments: codes (R, K), scales (R,), and weight (M, K), bias (M,) in ``dtype``.

    What is checked is the product, of operands as they are once quantised.
    """

    def make(device: torch.device) -> tuple[Any, ...]:
        x, weight, bias = _linear("linear", rows, inputs, outputs, dtype).inputs(device)
        return (*reference.quantize_rows(x, codes), weight, bias)

    def product(x: Tensor, scales: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # Quantised as the layer does it, from the half-precision weight; then widened.
        weight_codes, weight_scales = reference.quantize_rows(weight.to(dtype), codes)
        wide = weight.dtype if weight.dtype == torch.float64 else torch.float32
        a = x.to(wide) * scales.to(wide).unsqueeze(-1)
        b = weight_codes.to(wide) * weight_scales.to(wide).unsqueeze(-1)
        return F.linear(a, b, bias.to(wide)).to(weight.dtype)

    return Case(operator, f"R={rows} {inputs}→{outputs}", dtype, make, product, product,
                fusable=False, flops=2 * rows * inputs * outputs, timed=True)  # fmt: skip


def _groupnorm(
    n: int, channels: int, side: int, dtype: torch.dtype, *, timed: bool = False
) -> Case:
    def plain(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.silu(F.group_norm(x, groups, weight, bias, eps))

    inputs = _drawn(
        lambda x, weight, bias: (x.permute(0, 3, 1, 2), 32, weight, bias, NORM_EPS), dtype,
        (n, side, side, channels), (channels,), (channels,),
    )  # fmt: skip
    return Case("groupnorm_silu", f"N={n} C={channels} {side}x{side}", dtype, inputs,
                reference.groupnorm_silu, plain, timed=timed)  # fmt: skip


def _guided(n: int, side: int, dtype: torch.dtype, guided: bool, *, timed: bool = False) -> Case:
    """``guided``: with guidance and a learned variance, or with neither."""
    p, c = 2, 4
    rows, width = (2 * n, 2 * c * p * p) if guided else (n, c * p * p)

    def arguments(tokens: Tensor, *latents: Tensor) -> tuple[Any, ...]:
        z, before, noise = (each.float() for each in latents)
        scales = torch.linspace(1, 4, n, device=z.device)  # the first image is at exactly 1
        numbers = [1.25, -0.75, 0.5, 0.375, 0.125, 0.25, -4.0, -3.0, 1.0]
        return tokens, z, before, noise, scales, torch.tensor(numbers, device=z.device), 3, p

    inputs = _drawn(arguments, dtype, (rows, (side // p) ** 2, width), *[(n, c, side, side)] * 3)
    shape = f"N={n} S={side}" + (" guided, learned variance" if guided else "")
    return Case("guided_step", shape, dtype, inputs, reference.guided_step, reference.guided_step,
                timed=timed)  # fmt: skip
