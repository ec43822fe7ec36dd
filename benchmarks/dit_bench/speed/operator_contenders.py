"""Who computes an operator: the implementations of dit_kernels, and their opponents; and how far an
output is from right.

Each is a function that finds it, name → () → callable, so that what is not installed or cannot run
here raises where it is asked for, and is named in the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_bench.speed.operator_cases import Case, plain_attention
from dit_engine.backends.compile import compile_graph

Run = Callable[..., Any]
Find = Callable[[], Run]


def implementations(case: Case, device: torch.device) -> dict[str, Find]:
    """What of dit_kernels is to be checked, and timed, for ``case`` on ``device``."""
    if case.operator == "linear_int8":
        return {"packed": partial(_quantized, case)}
    if case.operator == "linear_fp8":
        return {"library": partial(_quantized, case)}
    if case.operator in ("linear", "linear_gelu"):
        packed = {"packed": partial(_packed, case)} if device.type == "cpu" else {}
        return {"library": partial(public, case, "auto"), **packed}
    if device.type == "cpu":
        return {"native": partial(public, case, "native")}
    found: dict[str, Find] = {"triton": partial(public, case, "triton")}
    if case.operator == "attention":
        found["triton-tma"] = partial(public, case, "triton-tma")
    return found


def opponents(case: Case, device: torch.device) -> dict[str, Find]:
    """What a plain torch model runs, torch.compile, and for attention torch's own other kernels.

    "eager" is that model's code in its own dtype, "reference" the definition, float32 inside.
    """
    if case.operator in ("linear_int8", "linear_fp8"):
        return {"eager": partial(_unquantized, case)}
    found: dict[str, Find] = {
        "eager": lambda: case.plain,
        "compile": partial(_compiled, case),
        "reference": lambda: case.reference,
    }
    if case.operator == "attention" and device.type == "cuda":
        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            name = backend.removesuffix("_ATTENTION").lower()
            found[f"sdpa-{name}"] = partial(_sdpa, backend)
    return found


def public(case: Case, impl: str) -> Run:
    """The public function of dit_kernels with ``impl``."""
    import dit_kernels

    return partial(getattr(dit_kernels, case.operator), impl=impl)


def _packed(case: Case) -> Run:
    """`PackedLinear`, its weight packed at the first call and kept."""
    from dit_kernels import PackedLinear

    layers: list[PackedLinear] = []

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not layers:
            layers.append(PackedLinear(weight, bias, len(x)))
        return layers[0](x, gelu=case.operator == "linear_gelu")

    return run


def _quantized(case: Case) -> Run:
    """`QuantizedLinear`, its weight quantised at the first call and kept, as are its codes."""
    from dit_kernels import QuantizedLinear

    kind = case.operator.removeprefix("linear_")
    layers: list[tuple[QuantizedLinear, Tensor]] = []

    def run(codes: Tensor, scales: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not layers:
            layer = QuantizedLinear(weight, bias, kind, case.dtype)
            if kind == "int8":  # oneDNN is quick with unsigned codes
                codes = (codes.to(torch.int16) + 128).to(torch.uint8)
            layers.append((layer, codes))
        layer, codes = layers[0]
        return layer(codes, scales)

    return run


def _unquantized(case: Case) -> Run:
    """The half-precision product that a quantised one replaces, of the same operands, rounded."""
    from dit_kernels import reference

    operands: list[tuple[Tensor, Tensor]] = []

    def run(codes: Tensor, scales: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not operands:
            rows, factors = reference.quantize_rows(weight, codes.dtype)
            pairs = ((codes, scales), (rows, factors))
            x, w = ((c.float() * s.unsqueeze(-1)).to(case.dtype) for c, s in pairs)
            operands.append((x, w))
        x, w = operands[0]
        return F.linear(x, w, bias)

    return run


def _compiled(case: Case) -> Run:
    # Without this, torch counts a definition's shapes together, and compiles no more after eight.
    torch.compiler.reset()
    return compile_graph(case.reference if case.fusable else case.plain)


def _sdpa(backend: str) -> Run:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, backend)

    def run(qkv: Tensor, num_heads: int) -> Tensor:
        with sdpa_kernel(chosen):
            return plain_attention(qkv, num_heads)

    return run


def _flash_attn() -> Run:
    from flash_attn import flash_attn_qkvpacked_func  # pyright: ignore[reportMissingImports]

    def run(qkv: Tensor, num_heads: int) -> Tensor:
        n, t, width = qkv.shape
        return flash_attn_qkvpacked_func(qkv.view(n, t, 3, num_heads, -1)).view(n, t, width // 3)

    return run


def _flash_attn_4() -> Run:
    from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]

    def run(qkv: Tensor, num_heads: int) -> Tensor:
        n, t, width = qkv.shape
        q, k, v = qkv.view(n, t, 3, num_heads, -1).unbind(2)  # each (N, T, H, d)
        result = flash_attn_func(q, k, v)
        out = result[0] if isinstance(result, tuple) else result
        return out.reshape(n, t, width // 3)

    return run


THIRD_PARTY: dict[str, Find] = {"flash_attn": _flash_attn, "flash-attn-4": _flash_attn_4}
"""Attention kernels of other packages."""


class Target:
    """What a case's outputs must be, and how far the same-dtype reference is from it."""

    def __init__(self, case: Case, arguments: tuple[Any, ...]) -> None:
        self.case, self.arguments = case, arguments
        self.device = next(a.device for a in arguments if isinstance(a, Tensor))
        exact = (case.exact or case.reference)(*map(_double, arguments))
        self.exact = tuple(t.double() for t in tensors(exact))
        self.same = case.reference(*arguments)
        self.budgets = self.errors(self.same)

    def errors(self, result: Any) -> list[float]:
        """`largest_error` of each output."""
        values = self.case.values
        found = values(result) if values else tensors(result)
        return [largest_error(a, b) for a, b in zip(found, self.exact, strict=True)]

    def worst(self, run: Callable[..., Any]) -> tuple[float, float]:
        """(largest error over the reference's own, largest error) of two calls of ``run``.

        Memory that is likely to be handed out for the outputs is filled with NaN beforehand, so
        that an element never written shows; a race may show in one of the calls.
        """
        ratios, errors, same = [], [], tensors(self.same)
        for _ in range(2):
            # All ones is NaN in every floating dtype.
            filled = [
                torch.full((t.nbytes,), 255, dtype=torch.uint8, device=t.device) for t in same
            ]
            del filled
            found = self.errors(run(*self.arguments))
            errors += found
            ratios += [e / b if b else (0.0 if e == 0 else math.inf)
                       for e, b in zip(found, self.budgets, strict=True)]  # fmt: skip
        return float(np.max(ratios)), float(np.max(errors))  # NaN if any is NaN


def largest_error(actual: Tensor, exact: Tensor) -> float:
    """max |actual − exact| / max |exact| in float64, infinite for another shape; NaN stays NaN."""
    if actual.shape != exact.shape:
        return math.inf
    if not exact.numel():
        return 0.0
    difference = (actual.double() - exact.double()).abs().max()
    return (difference / exact.double().abs().max().clamp(min=1e-300)).item()


def tensors(result: Any) -> tuple[Tensor, ...]:
    """An operator's result as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _double(argument: Any) -> Any:
    floating = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.double() if floating else argument
