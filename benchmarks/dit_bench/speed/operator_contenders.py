"""Who computes an operator: the implementations of dit_kernels, and their opponents.

Each is a function that finds it, name → () → callable, so that what is not installed or cannot run
here raises where it is asked for, and is named in the report.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

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
