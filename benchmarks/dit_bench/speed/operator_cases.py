"""Every operator of dit_kernels at important shapes, and its implementations and opponents.

Letters as in `dit_kernels.reference`: N images, T tokens, D width, H heads; R rows of a product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dit_kernels
from dit_bench.ceilings import FP8, NAMES
from dit_engine.backends.compile import compile_graph
from dit_engine.config import FAMILIES
from dit_engine.model import NORM_EPS, modulate
from dit_kernels import PackedLinear, QuantizedLinear, reference
from dit_kernels.attention_libraries import NAMES as LIBRARIES
from dit_kernels.dispatch import attention_candidates

DTYPE = torch.bfloat16
TOKENS = 256  # of an image of 256 pixels
Run = Callable[[], Any]
Make = Callable[..., Run]
"""An operator's arguments → a function that computes it for them. What is not installed or cannot
run here raises where it is made or first called."""


@dataclass(frozen=True)
class Case:
    """An operator of dit_kernels at one shape, with x of `DTYPE`.

    Attributes:
        inputs: device → arguments, the same at every call.
        reference: the definition; given float64 arguments it computes in float64.
        plain: what a plain torch model runs for it, in `DTYPE`.
        fusable: torch.compile gets the definition, otherwise ``plain``. The definitions of products
            compute in float32, which would be too slow an opponent for half precision.
        flops: of its matrix products, one multiply-add counted as two; 0 for memory-bound work.
        values: result → tensors to compare; the result's own by default.
        exact: (float64 arguments) → what ``values`` are compared with; ``reference`` by default.
        sizes: (N, T, H, d) of attention; (rows, inputs, outputs) of a product.
    """

    operator: str
    shape: str
    inputs: Callable[[torch.device], tuple[Any, ...]]
    reference: Callable[..., Any]
    plain: Callable[..., Any]
    fusable: bool = True
    flops: int = 0
    values: Callable[[Any], tuple[Tensor, ...]] | None = None
    exact: Callable[..., Any] | None = None
    sizes: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.operator} {self.shape}"


def all_cases(device: torch.device) -> list[Case]:
    """The cases of DiT-XL/2 at 256 pixels for one image under guidance; on CUDA, each operator
    first for 32 images. The most important come first, in case time runs out."""
    _, d, heads = FAMILIES["XL"]
    cases = cases_of(2, TOKENS, d, heads)
    if device.type == "cuda":
        full = cases_of(64, TOKENS, d, heads)
        cases = [case for pair in zip(full, cases, strict=True) for case in pair]
        order = ("attention", "linear", "linear_gelu", "linear_fp8")  # then the row kernels
        cases.sort(key=lambda case: [*order, case.operator].index(case.operator))
        return [case for case in cases if "int8" not in case.title]
    return [case for case in cases if case.operator != "linear_fp8" and "to fp8" not in case.shape]


def cases_of(n: int, t: int, d: int, heads: int) -> list[Case]:
    """The operators of a DiT of width ``d`` for ``n`` rows and, for n/2 images, those of the
    sampler's step and of Stable Diffusion's decoder at 256 pixels."""
    shape, x, vectors, images = f"N={n} T={t} D={d}", (n, t, d), (n, 6 * d), max(1, n // 2)

    def norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        return modulate(F.layer_norm(x, x.shape[-1:], eps=eps), shift, scale)

    def gate_norm(x: Tensor, y: Tensor, gate: Tensor, *norms: Any) -> tuple[Tensor, Tensor]:
        x = x + gate.unsqueeze(1) * y
        return x, norm(x, *norms)

    cases = [
        _case("layernorm_modulate", shape,
              lambda x, m: (x, *m.chunk(6, dim=1)[:2], NORM_EPS), x, vectors, plain=norm),
        _case("gate_residual_layernorm_modulate", shape,
              lambda x, y, m: (x, y, *m.chunk(6, dim=1)[:3], NORM_EPS), x, x, vectors,
              plain=gate_norm),
        _case("gate_residual", shape, lambda x, y, m: (x, y, m.chunk(6, dim=1)[0]),
              x, x, vectors, plain=lambda x, y, gate: x + gate.unsqueeze(1) * y),
        _case("attention", f"N={n} T={t} H={heads} d={d // heads}",
              lambda qkv: (qkv, heads), (n, t, 3 * d), plain=plain_attention, fusable=False,
              flops=4 * n * t * t * d, sizes=(n, t, heads, d // heads)),
    ]  # fmt: skip
    for codes in (torch.int8, FP8):
        to = f"{shape} to {NAMES[codes]}"
        cases += [
            # Against the norm itself: in its quantised form, a tie may be rounded either way.
            _case("layernorm_modulate_quantize", to,
                  lambda x, m, c=codes: (x, *m.chunk(6, dim=1)[:2], NORM_EPS, c), x, vectors,
                  values=_dequantized,
                  exact=lambda *inputs: reference.layernorm_modulate(*inputs[:-1])),
            _case("quantize_rows", to, lambda x, c=codes: (x, c), x, values=_dequantized,
                  exact=lambda x, _: x),
        ]  # fmt: skip
    cases += [
        _linear("linear", n * t, d, 3 * d),
        _linear("linear_gelu", n * t, d, 4 * d),
        _linear("linear", n * t, 4 * d, d),
        _linear("linear", n * t, d, d),
    ]
    for operator, codes in (("linear_int8", torch.int8), ("linear_fp8", FP8)):
        for widths in ((d, 3 * d), (d, 4 * d), (4 * d, d)):
            cases.append(_quantized_linear(operator, n * t, *widths, codes))
    return [
        *cases, _guided(images, 32),
        *(_groupnorm(min(8, images), *shape) for shape in ((512, 32), (128, 256))),
    ]  # fmt: skip


def ragged_cases() -> list[Case]:
    """Row kernels and attention of XL/2 with tiles that are not full: 3 images of 250 tokens."""
    _, d, heads = FAMILIES["XL"]
    return [c for c in cases_of(3, 250, d, heads) if "T=250" in c.shape and "int8" not in c.shape]


def plain_attention(qkv: Tensor, num_heads: int) -> Tensor:
    n, t, width = qkv.shape
    q, k, v = qkv.view(n, t, 3, num_heads, -1).permute(2, 0, 3, 1, 4)  # each (N, H, T, d)
    y = F.scaled_dot_product_attention(q, k, v)  # (N, H, T, d)
    return y.transpose(1, 2).reshape(n, t, width // 3)


def _case(
    operator: str,
    shape: str,
    arguments: Callable[..., tuple[Any, ...]],
    *shapes: tuple[int, ...],
    plain: Callable[..., Any] | None = None,
    **more: Any,
) -> Case:
    """A case with the inputs that ``arguments`` makes from normal tensors of ``shapes``. plain: the
    definition unless given."""

    def inputs(device: torch.device) -> tuple[Any, ...]:
        draw = torch.Generator(device).manual_seed(0)
        tensors = (torch.randn(each, generator=draw, device=device) for each in shapes)
        return arguments(*(tensor.to(DTYPE) for tensor in tensors))

    definition = getattr(reference, operator)
    return Case(operator, shape, inputs, definition, plain or definition, **more)


def _dequantized(result: tuple[Tensor, Tensor]) -> tuple[Tensor]:
    codes, scales = result
    return (codes.double() * scales.double().unsqueeze(-1),)


def _gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _linear(operator: str, rows: int, inputs: int, outputs: int) -> Case:
    return _case(operator, f"R={rows} {inputs}→{outputs}",
                 lambda weight, x, bias: (x, weight * inputs**-0.5, bias),
                 (outputs, inputs), (rows, inputs), (outputs,), fusable=False,
                 plain=_gelu if operator == "linear_gelu" else F.linear,
                 flops=2 * rows * inputs * outputs, sizes=(rows, inputs, outputs))  # fmt: skip


def _quantized_linear(
    operator: str, rows: int, inputs: int, outputs: int, codes: torch.dtype
) -> Case:
    """Arguments: codes (R, K), scales (R,), and weight (M, K), bias (M,) in `DTYPE`.

    The product of the quantised operands is checked, not their quantisation.
    """
    plain = _linear("linear", rows, inputs, outputs)

    def make(device: torch.device) -> tuple[Any, ...]:
        x, weight, bias = plain.inputs(device)
        return (*reference.quantize_rows(x, codes), weight, bias)

    def product(x: Tensor, scales: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # Quantised as in the layer, from the half-precision weight; then widened.
        weight_codes, weight_scales = reference.quantize_rows(weight.to(DTYPE), codes)
        wide = weight.dtype if weight.dtype == torch.float64 else torch.float32
        a = x.to(wide) * scales.to(wide).unsqueeze(-1)
        b = weight_codes.to(wide) * weight_scales.to(wide).unsqueeze(-1)
        return F.linear(a, b, bias.to(wide)).to(weight.dtype)

    return Case(operator, plain.shape, make, product, product, fusable=False,
                flops=plain.flops)  # fmt: skip


def _groupnorm(n: int, channels: int, side: int) -> Case:
    def plain(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.silu(F.group_norm(x, groups, weight, bias, eps))

    return _case("groupnorm_silu", f"N={n} C={channels} {side}x{side}",
                 lambda x, weight, bias: (x.permute(0, 3, 1, 2), 32, weight, bias, NORM_EPS),
                 (n, side, side, channels), (channels,), (channels,), plain=plain)  # fmt: skip


def _guided(n: int, side: int) -> Case:
    p, c = 2, 4

    def arguments(tokens: Tensor, *latents: Tensor) -> tuple[Any, ...]:
        z, before, noise = (each.float() for each in latents)
        scales = torch.linspace(1, 4, n, device=z.device)  # the first image is at exactly 1
        numbers = [1.25, -0.75, 0.5, 0.375, 0.125, 0.25, -4.0, -3.0, 1.0]
        return tokens, z, before, noise, scales, torch.tensor(numbers, device=z.device), 3, p

    return _case("guided_step", f"N={n} S={side} guided, learned variance", arguments,
                 (2 * n, (side // p) ** 2, 2 * c * p * p), *[(n, c, side, side)] * 3)  # fmt: skip


def implementations(case: Case, device: torch.device) -> dict[str, Make]:
    """The implementations in dit_kernels that are checked and timed for ``case`` on ``device``."""
    if case.operator == "linear_int8":
        return {"packed": partial(_quantized, case)}
    if case.operator == "linear_fp8":
        return {"library": partial(_quantized, case)}
    if case.operator in ("linear", "linear_gelu"):
        own = (
            {"packed": partial(_packed, case)} if device.type == "cpu" else _products(case, device)
        )
        return {"library": public(case, "auto"), **own}
    if device.type == "cpu":
        return {"native": public(case, "native")}
    if case.operator == "attention":
        found = attention_candidates(*case.sizes[:4], dtype=DTYPE, device=device)
        return {name: _calling(run) for name, run in found.items() if name not in LIBRARIES}
    return {"triton": public(case, "triton")}


def _products(case: Case, device: torch.device) -> dict[str, Make]:
    """Our product in every tiling among which the lean forward chooses, except split ones."""
    from dit_kernels.triton import product as own
    from dit_kernels.triton.attention import device_facts

    found = own.candidates(*case.sizes[:3], processors=device_facts(device)[1])
    return {f"triton {name}": _calling(own.product, tiles=t, gelu=case.operator == "linear_gelu")
            for name, t in found.items() if t.splits == 1}  # fmt: skip


def opponents(case: Case, device: torch.device) -> dict[str, Make]:
    """The opponents: plain torch, torch.compile (on CUDA only if it can fuse) and libraries."""
    if case.operator in ("linear_int8", "linear_fp8"):
        return {"eager": partial(_unquantized, case)}
    found: dict[str, Make] = {"eager": _calling(case.plain)}
    if case.fusable or device.type != "cuda":
        found["compile"] = partial(_compiled, case)
    if case.operator == "attention" and device.type == "cuda":
        found |= {name: public(case, name) for name in LIBRARIES}
    return found


def public(case: Case, impl: str) -> Make:
    """The public function of dit_kernels with ``impl``."""
    return _calling(getattr(dit_kernels, case.operator), impl=impl)


def _calling(function: Callable[..., Any], **options: Any) -> Make:
    return lambda *arguments: partial(function, *arguments, **options)


def _packed(case: Case, x: Tensor, weight: Tensor, bias: Tensor) -> Run:
    layer = PackedLinear(weight, bias, len(x))
    return lambda: layer(x, gelu=case.operator == "linear_gelu")


def _quantized(case: Case, codes: Tensor, scales: Tensor, weight: Tensor, bias: Tensor) -> Run:
    kind = case.operator.removeprefix("linear_")
    layer = QuantizedLinear(weight, bias, kind, DTYPE)
    if kind == "int8":  # oneDNN is quick with unsigned codes
        codes = (codes.to(torch.int16) + 128).to(torch.uint8)
    return lambda: layer(codes, scales)


def _unquantized(case: Case, codes: Tensor, scales: Tensor, weight: Tensor, bias: Tensor) -> Run:
    """The half-precision product that a quantised one replaces, of the same (rounded) operands."""
    pairs = ((codes, scales), reference.quantize_rows(weight, codes.dtype))
    x, w = ((c.float() * s.unsqueeze(-1)).to(DTYPE) for c, s in pairs)
    return lambda: F.linear(x, w, bias)


def _compiled(case: Case, *arguments: Any) -> Run:
    # Without this, torch counts all shapes of a definition, and stops compiling after eight.
    torch.compiler.reset()
    return partial(compile_graph(case.reference if case.fusable else case.plain), *arguments)
