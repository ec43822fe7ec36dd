"""Linear layers: of the library, with packed weights, and in int8 and fp8."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import random
from numerics import relative_error
from products import has_int8, require_int8
from torch import Tensor

import dit_kernels
from dit_kernels import PackedLinear, QuantizedLinear, Unavailable, quantized, reference
from dit_kernels.cpu import product
from dit_kernels.quantized import FP8, Quantizer

N, T, D, M = 2, 5, 64, 24
WEIGHT, BIAS = random(M, D, seed=1), random(M, seed=2)
X, Y, GATE, SHIFT, SCALE = cases.row_inputs(N, T, D, torch.float32)
WITH_GELU = pytest.mark.parametrize("gelu", [False, True])


def gelu_if(gelu: bool, x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh") if gelu else x


@WITH_GELU
def test_against_float64_with_gradients(gelu: bool) -> None:
    run = dit_kernels.linear_gelu if gelu else dit_kernels.linear
    packed = PackedLinear(WEIGHT, BIAS)
    expected = gelu_if(gelu, F.linear(X.double(), WEIGHT.double(), BIAS.double()))
    into = torch.empty(N, T, M)
    for out in (run(X, WEIGHT, BIAS), run(X, WEIGHT, BIAS, impl="reference"), packed(X, gelu),
                packed(X, gelu, out=into), into):  # fmt: skip
        assert relative_error(out, expected) < 2e-6
    for which in range(3):
        inputs = [v.clone() for v in (X, WEIGHT, BIAS)]
        inputs[which].requires_grad_()
        got, wanted = (
            torch.autograd.grad(run(*inputs, impl=impl).square().sum(), inputs[which])[0]
            for impl in ("auto", "reference")
        )
        assert relative_error(got, wanted) < 1e-5
    with pytest.raises(Unavailable, match="PackedLinear has no backward pass"):
        packed(X.clone().requires_grad_(), gelu)


def test_a_weight_that_is_a_transpose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its contiguous copy must live until it is packed."""
    call = product.call

    def after_others_took_what_is_free(*arguments: object) -> None:
        taken = [torch.full((64, 2048), torch.nan) for _ in range(4)]
        call(*arguments)  # type: ignore[arg-type]
        del taken

    monkeypatch.setattr(product, "call", after_others_took_what_is_free)
    x, weight, bias = random(3, 64), random(64, 2048, seed=1), random(2048, seed=2)
    expected = F.linear(x.double(), weight.double().t(), bias.double())
    assert relative_error(PackedLinear(weight.t(), bias)(x), expected) < 1e-6
    require_int8()
    codes = reference.quantize_rows(x, torch.int8)
    layers = [QuantizedLinear(w, bias, "int8", torch.float32)
              for w in (weight.t(), weight.t().contiguous())]  # fmt: skip
    assert torch.equal(layers[0](*codes), layers[1](*codes))


def test_torch_compile_takes_the_linears_whole() -> None:
    packed = PackedLinear(WEIGHT, BIAS)
    calls: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (dit_kernels.linear_gelu, (X, WEIGHT, BIAS)),
        (lambda h: packed(h, True), (X,)),
    ]
    if has_int8():
        layer = QuantizedLinear(WEIGHT, BIAS, "int8", torch.float32)
        calls.append((lambda c, s: layer(c, s, True), reference.quantize_rows(X, torch.int8)))
    for run, arguments in calls:
        compiled = torch.compile(run, backend="eager", fullgraph=True)
        assert relative_error(compiled(*arguments), run(*arguments)) < 1e-5


@WITH_GELU
def test_int8_equals_its_own_codes_multiplied_exactly(gelu: bool) -> None:
    require_int8()
    layer = QuantizedLinear(WEIGHT, BIAS, "int8", torch.float32)
    (a, a_scales), (w, w_scales) = (reference.quantize_rows(v, torch.int8) for v in (X, WEIGHT))
    exact = (a.double() @ w.double().T) * a_scales.double()[..., None] * w_scales.double()
    expected = gelu_if(gelu, exact + BIAS.double()).view(-1, M)
    out = layer(a, a_scales, gelu)
    assert relative_error(out, expected) < 1e-5
    assert torch.equal(out, layer((a.int() + 128).to(torch.uint8), a_scales, gelu))
    assert torch.equal(out, layer(a.repeat(1, 1, 2)[..., :D], a_scales, gelu))  # rows apart
    into = torch.empty_like(out)
    layer(a, a_scales, gelu, out=into)
    assert torch.equal(out, into)


@WITH_GELU
def test_fp8_by_torchs_own_operator(monkeypatch: pytest.MonkeyPatch, gelu: bool) -> None:
    """The call that CUDA gets; the CPU has the operator, too, without any speed."""
    monkeypatch.setattr(quantized, "quantized_why_not", lambda *_: None)
    x, weight, bias = random(3, 5, 48), random(48, 32, seed=1).t(), random(32, seed=2)
    layer = QuantizedLinear(weight, bias, "fp8", torch.bfloat16)
    (a, a_scales), (w, w_scales) = (reference.quantize_rows(v, FP8) for v in (x, weight))
    exact = (a.double() @ w.double().T) * a_scales.double()[..., None] * w_scales.double()
    exact = gelu_if(gelu, exact + bias.bfloat16().double())
    assert relative_error(layer(a, a_scales, gelu).view(3, 5, 32), exact) < 2**-7


def test_what_layers_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    full, half, brain = torch.float32, torch.float16, torch.bfloat16
    linear, packed = dit_kernels.linear, PackedLinear(WEIGHT, BIAS)

    def layer(m: int, k: int, kind: str, dtype: torch.dtype) -> QuantizedLinear:
        return QuantizedLinear(random(m, k), random(m), kind, dtype)

    with pytest.raises(Unavailable, match=r"^fp8 products are for CUDA"):
        layer(32, 48, "fp8", brain)
    with pytest.raises(Unavailable, match="products of unpacked weights stay with the library"):
        linear(X, WEIGHT, BIAS, impl="native")
    codes = torch.zeros(N, T, D, dtype=torch.int8), torch.zeros(N, T)
    monkeypatch.setattr(quantized, "quantized_why_not", lambda *_: None)
    refused: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
        (linear, (X, WEIGHT[:, :3], BIAS), r"^weight is torch.float32 \(24, 3\) on .*\(N, 64\)"),
        (packed, (random(2, 3),), r"^x is torch.float32 \(2, 3\) on cpu; .* \(2, 64\)"),
        (layer, (32, 48, "int4", full), r"^kind 'int4': choose one of int8, fp8$"),
        (layer, (32, 48, "int8", half), r"^dtype torch.float16: results of 'int8' are float32, bf"),
        (layer, (40, 32, "fp8", brain), r"^weight has shape .*; 'fp8' needs multiples of 16$"),
    ]
    if has_int8():
        int8 = QuantizedLinear(WEIGHT, BIAS, "int8", full)
        refused += [
            (int8, (codes[0][..., :8], codes[1]), r"^codes is torch\.int8 .*; .*\(2, 5, 64\)"),
            (int8, (codes[0], codes[1][:, :1]), r"^scales is .* \(2, 1\) on cpu; float32 \(2, 5\)"),
        ]
    for run, arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            run(*arguments)


SATURATING = """
import torch, dit_kernels
try:
    layer = dit_kernels.QuantizedLinear(torch.ones(8, 256), torch.zeros(8), "int8", torch.float32)
    codes, scales = dit_kernels.layernorm_modulate_quantize(
        torch.randn(1, 4, 256), torch.ones(1, 256), torch.full((1, 256), -1.0))
    print(layer(codes, scales)[0, 0].item())
except dit_kernels.Unavailable as reason:
    print(reason)
"""


@pytest.mark.slow
def test_int8_is_exact_or_refused_where_onednn_saturates() -> None:
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "DIT_KERNELS_ISA": "avx2"}
    done = subprocess.run([sys.executable, "-c", SATURATING], env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    said = done.stdout.strip()
    refused = said.startswith("int8 products need oneDNN on a processor with VNNI or AMX")
    assert refused or float(said) == pytest.approx(256, rel=1e-4), done.stderr


@pytest.mark.parametrize("fused", [True, False])
def test_a_quantizer_gives_the_codes_of_the_unrounded_norm(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        monkeypatch.setattr(quantized.native, "why_not", lambda: "not built")
    quantize = Quantizer("int8", torch.device("cpu"))
    norm: tuple[Any, ...] = (SHIFT, SCALE, 1e-6)
    residual = X + GATE[:, None] * Y
    x = X.clone()
    for (codes, scales), operator, arguments in (
        (quantize.rows(X), "quantize_rows", (X,)),
        (quantize.norm(X, *norm), "layernorm_modulate_quantize", (X, *norm, torch.uint8)),
        (
            quantize.gated_norm(x, Y, GATE, *norm),
            "layernorm_modulate_quantize",
            (residual, *norm, torch.uint8),
        ),
    ):
        assert codes.dtype == torch.uint8 and scales.shape == (N, T)
        cases.check_codes(operator, arguments, (codes, scales))
    cases.check_codes("gelu_quantize_rows", (X,), quantize.gelu_rows(X))
    assert relative_error(x, residual) < 1e-6  # in place
