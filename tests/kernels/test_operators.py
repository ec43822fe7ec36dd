"""The public operators: references against closed forms, refusals, torch.compile and export."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from numerics import relative_error
from products import has_int8, require_int8
from torch import Tensor, nn

import dit_kernels
from dit_kernels import Unavailable, quantized, reference
from dit_kernels import dispatch as choose
from dit_kernels.cpu import operators as native
from dit_kernels.cpu import product as native_product
from dit_kernels.quantized import FP8, Quantizer, _Separate, quantizer

N, T, D = 2, 5, 48
Results = Tensor | tuple[Tensor, ...]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


X, Y = random(N, T, D), random(N, T, D, seed=1)
GATE, SHIFT, SCALE = random(N, 6 * D, seed=2).chunk(6, dim=1)[:3]
IMAGES = random(N, 8, 4, 4).contiguous(memory_format=torch.channels_last)
WEIGHT, BIAS = random(8, seed=3), random(8, seed=4)
LATENTS = random(N, 4, 8, 8)
STEP = {
    "tokens": random(2 * N, 16, 32),
    "z": LATENTS,
    "x0_before": LATENTS + 1,
    "noise": LATENTS - 1,
    "guidance_scale": torch.tensor([1.0, 4.0]),
    "coefficients": torch.tensor([1.1, -0.4, 0.3, 0.7, 0.2, 0.1, -3.0, -1.0, 1.0]),
    "guided_channels": 3,
    "patch_size": 2,
}

CALLS: dict[str, tuple[Callable[..., Results], tuple[object, ...]]] = {
    "layernorm_modulate": (dit_kernels.layernorm_modulate, (X, SHIFT, SCALE)),
    "gate_residual_layernorm_modulate": (
        dit_kernels.gate_residual_layernorm_modulate, (X, Y, GATE, SHIFT, SCALE)),
    "gate_residual": (dit_kernels.gate_residual, (X, Y, GATE)),
    "attention": (dit_kernels.attention, (random(N, T, 3 * D), 2)),
    "groupnorm_silu": (dit_kernels.groupnorm_silu, (IMAGES, 4, WEIGHT, BIAS)),
    "guided_step": (dit_kernels.guided_step, tuple(STEP.values())),
    "layernorm_modulate_quantize": (dit_kernels.layernorm_modulate_quantize, (X, SHIFT, SCALE)),
    "quantize_rows": (dit_kernels.quantize_rows, (X,)),
}  # fmt: skip


def as_tuple(results: Results) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def assert_same(actual: Results, expected: Results) -> None:
    for a, b in zip(as_tuple(actual), as_tuple(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert relative_error(a, b) < 1e-5 if a.is_floating_point() else (a - b).abs().max() <= 1


@pytest.mark.parametrize("name", CALLS)
def test_auto_equals_the_reference(name: str) -> None:
    run, arguments = CALLS[name]
    assert_same(run(*arguments), run(*arguments, impl="reference"))


def test_references_equal_what_the_model_does() -> None:
    wide = X.double()
    normed = F.layer_norm(wide, (D,), eps=1e-6)
    expected = normed * (1 + SCALE.double()[:, None]) + SHIFT.double()[:, None]
    assert relative_error(reference.layernorm_modulate(X, SHIFT, SCALE, 1e-6), expected) < 1e-6
    summed = wide + GATE.double()[:, None] * Y.double()
    assert relative_error(reference.gate_residual(X, Y, GATE), summed) < 1e-6
    r, h = reference.gate_residual_layernorm_modulate(X, Y, GATE, SHIFT, SCALE, 1e-6)
    assert relative_error(r, summed) < 1e-6
    normed = F.layer_norm(summed, (D,), eps=1e-6)
    expected = normed * (1 + SCALE.double()[:, None]) + SHIFT.double()[:, None]
    assert relative_error(h, expected) < 1e-6

    qkv = random(N, T, 3 * D).double()
    q, k, v = qkv.view(N, T, 3, 2, D // 2).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, T, D)
    assert relative_error(reference.attention(qkv.float(), 2), expected) < 1e-6

    norm = nn.GroupNorm(4, 8, eps=1e-6).double()
    norm.weight.data, norm.bias.data = WEIGHT.double(), BIAS.double()
    expected = F.silu(norm(IMAGES.double()))
    assert relative_error(reference.groupnorm_silu(IMAGES, 4, WEIGHT, BIAS, 1e-6), expected) < 1e-6

    x = random(3, 5, 8)
    expected = (
        0.5
        * x.double()
        * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x.double() + 0.044715 * x.double() ** 3)))
    )
    assert relative_error(reference.gelu(x), expected) < 1e-6


def test_quantised_rows_are_within_half_a_step() -> None:
    x = random(7, 33) * 5
    codes, scales = reference.quantize_rows(x, torch.int8)
    assert codes.dtype == torch.int8
    assert torch.equal(codes.abs().amax(-1), torch.full((7,), 127, dtype=torch.int8))
    assert ((codes * scales[:, None] - x).abs() <= 0.5001 * scales[:, None]).all()
    shifted, _ = reference.quantize_rows(x, torch.uint8)
    assert torch.equal(shifted.int() - 128, codes.int())
    fp8, scales = reference.quantize_rows(x, torch.float8_e4m3fn)
    assert relative_error(fp8.float() * scales[:, None], x) < 2**-4


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("shape", [(7, 33), (33,), (2, 3, 5, 64), (0, 8)], ids=str)
def test_rows_are_quantised_by_the_public_operator(shape: tuple[int, ...], impl: str) -> None:
    """Against float64: the largest of a row is code 127, the others at most half a step away."""
    x = random(*shape) * 5
    codes, scales = dit_kernels.quantize_rows(x, impl=impl)
    assert codes.dtype == torch.int8 and codes.shape == x.shape
    assert scales.dtype == torch.float32 and scales.shape == x.shape[:-1]
    expected = x.double().abs().amax(-1) / 127
    assert relative_error(scales, expected) < 1e-6 if x.numel() else scales.numel() == 0
    error = (codes.double() * expected.unsqueeze(-1) - x.double()).abs()
    assert (error <= 0.5001 * expected.unsqueeze(-1)).all()
    fp8, scales = dit_kernels.quantize_rows(x, FP8, impl=impl)
    assert fp8.dtype == FP8 and scales.shape == x.shape[:-1]
    restored = fp8.double() * scales.double().unsqueeze(-1)
    assert relative_error(restored, x.double()) < 2**-4 if x.numel() else fp8.numel() == 0


def test_linear_and_gelu_against_float64() -> None:
    x, weight, bias = random(2, 5, 16), random(24, 16, seed=1), random(24, seed=2)
    expected = F.linear(x.double(), weight.double(), bias.double())
    packed = dit_kernels.PackedLinear(weight, bias)
    for out in (dit_kernels.linear(x, weight, bias), packed(x),
                dit_kernels.linear(x, weight, bias, impl="reference")):  # fmt: skip
        assert relative_error(out, expected) < 1e-6
    expected = F.gelu(expected, approximate="tanh")
    for out in (dit_kernels.linear_gelu(x, weight, bias), packed(x, gelu=True),
                dit_kernels.linear_gelu(x, weight, bias, impl="reference")):  # fmt: skip
        assert relative_error(out, expected) < 2e-6
    with pytest.raises(Unavailable, match="products of unpacked weights stay with the library"):
        dit_kernels.linear(x, weight, bias, impl="native")


def test_quantized_linear_equals_its_own_codes_multiplied_exactly() -> None:
    require_int8()
    x, weight, bias = random(9, 64), random(24, 64, seed=1), random(24, seed=2)
    layer = dit_kernels.QuantizedLinear(weight, bias, "int8", torch.float32)
    a, a_scales = reference.quantize_rows(x, torch.int8)
    w, w_scales = reference.quantize_rows(weight, torch.int8)
    exact = (a.double() @ w.double().T) * a_scales.double()[:, None] * w_scales.double()
    codes, scales = quantizer("int8", torch.device("cpu")).rows(x)
    for gelu in (False, True):
        expected = exact + bias.double()
        expected = F.gelu(expected, approximate="tanh") if gelu else expected
        # A code may differ by one where the quotient is a tie; a wrong scale would show.
        assert relative_error(layer(codes, scales, gelu), expected) < 2e-3
    with pytest.raises(ValueError, match=r"^kind 'int4': choose one of int8, fp8$"):
        dit_kernels.QuantizedLinear(weight, bias, "int4", torch.float32)
    with pytest.raises(Unavailable, match=r"^fp8 products are for CUDA"):
        dit_kernels.QuantizedLinear(weight, bias, "fp8", torch.bfloat16)


def test_int8_codes_of_the_public_operator_feed_a_quantized_linear() -> None:
    require_int8()
    weight, bias = random(24, D, seed=1), random(24, seed=2)
    layer = dit_kernels.QuantizedLinear(weight, bias, "int8", torch.float32)
    codes, scales = dit_kernels.layernorm_modulate_quantize(X, SHIFT, SCALE)
    expected = F.linear(reference.layernorm_modulate(X, SHIFT, SCALE, 1e-6), weight, bias)
    out = layer(codes, scales).view(N, T, 24)
    assert relative_error(out, expected) < 0.02
    assert torch.equal(out, layer((codes.int() + 128).to(torch.uint8), scales).view(N, T, 24))
    strided = codes.repeat(1, 1, 2)[..., :D]  # rows apart
    assert torch.equal(out, layer(strided, scales).view(N, T, 24))
    for bad, message in (
        ((codes[..., :8], scales), r"codes are torch\.int8 \(2, 5, 8\) on cpu; int8 \(…, 48\)"),
        ((codes.float(), scales), "codes are torch.float32"),
        ((codes, scales[:, :1]), r"scales are torch\.float32 \(2, 1\) on cpu; float32 \(2, 5\)"),
        ((codes, scales.double()), "scales are torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*bad)
    with pytest.raises(
        ValueError, match=r"^dtype torch.float16: results of 'int8' are float32, bf"
    ):
        dit_kernels.QuantizedLinear(weight, bias, "int8", torch.float16)


SATURATING = """
import torch, dit_kernels
weight = torch.ones(8, 256)
try:
    layer = dit_kernels.QuantizedLinear(weight, torch.zeros(8), "int8", torch.float32)
    codes, scales = dit_kernels.layernorm_modulate_quantize(
        torch.randn(1, 4, 256), torch.ones(1, 256), torch.full((1, 256), -1.0))
    print(layer(codes, scales)[0, 0].item())
except dit_kernels.Unavailable as reason:
    print(reason)
"""


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "DEFAULT"])
def test_int8_is_exact_or_refused_whatever_onednn_has(isa: str) -> None:
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa, "DIT_KERNELS_ISA": "avx2"}
    done = subprocess.run([sys.executable, "-c", SATURATING], env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    said = done.stdout.strip()
    assert said == (
        "int8 products need a processor with VNNI or AMX: oneDNN's sums saturate here"
    ) or float(said) == pytest.approx(256, rel=1e-4), done.stderr


@pytest.mark.parametrize("gelu", [False, True])
def test_fp8_products_of_torchs_own_operator(monkeypatch: pytest.MonkeyPatch, gelu: bool) -> None:
    """The call that CUDA gets; the CPU has the operator, too, without any speed."""
    monkeypatch.setattr(quantized, "quantized_why_not", lambda *_: None)
    x, weight, bias = random(3, 5, 48), random(48, 32, seed=1).t(), random(32, seed=2)
    layer = dit_kernels.QuantizedLinear(weight, bias, "fp8", torch.bfloat16)
    (a, a_scales), (w, w_scales) = (reference.quantize_rows(v, FP8) for v in (x, weight))
    exact = (a.double() @ w.double().T) * a_scales.double()[..., None] * w_scales.double()
    exact += bias.bfloat16().double()
    exact = F.gelu(exact, approximate="tanh") if gelu else exact
    assert relative_error(layer(a, a_scales, gelu).view(3, 5, 32), exact) < 2**-7


def test_what_fp8_products_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would, at the first call."""
    monkeypatch.setattr(quantized, "quantized_why_not", lambda *_: None)
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(ValueError, match=f"^dtype {dtype}: results of 'fp8' are bfloat16$"):
            dit_kernels.QuantizedLinear(random(32, 48), random(32), "fp8", dtype)
    for shape in ((32, 40), (40, 32)):
        with pytest.raises(ValueError, match=r"^weight has shape .*; 'fp8' needs multiples of 16$"):
            dit_kernels.QuantizedLinear(random(*shape), random(shape[0]), "fp8", torch.bfloat16)


def test_fp8_codes_come_from_the_reference_where_no_kernel_has_them() -> None:
    codes, scales = dit_kernels.layernorm_modulate_quantize(X, SHIFT, SCALE, 1e-6, FP8)
    expected = reference.layernorm_modulate(X, SHIFT, SCALE, 1e-6)
    assert codes.dtype == FP8
    assert relative_error(codes.float() * scales[..., None], expected) < 2**-4


@pytest.mark.parametrize("name", ["layernorm_modulate", "attention", "groupnorm_silu"])
def test_gradients_come_from_the_reference_and_are_never_dropped(name: str) -> None:
    run, (x, *rest) = CALLS[name]
    x = x.clone().requires_grad_()
    out = run(x, *rest)
    (got,) = torch.autograd.grad(out.square().sum(), x)
    (expected,) = torch.autograd.grad(run(x, *rest, impl="reference").square().sum(), x)
    assert relative_error(got, expected) < 1e-6
    with torch.no_grad():
        assert not run(x, *rest).requires_grad
    if native.available():
        with pytest.raises(Unavailable, match=f"{name} has no backward pass there"):
            run(x, *rest, impl="native")


@pytest.mark.parametrize("impl", ["triton", "triton-tma", "native"])
def test_no_kernel_drops_a_gradient(impl: str) -> None:
    """Whether it could run here or not."""
    _, (qkv, heads) = CALLS["attention"]
    with pytest.raises(Unavailable, match="attention has no backward pass there"):
        dit_kernels.attention(qkv.clone().requires_grad_(), heads, impl=impl)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("gelu", [False, True])
def test_gradients_of_the_linears(gelu: bool, which: int) -> None:
    arguments = [random(3, 5, 16), random(24, 16, seed=1), random(24, seed=2)]
    arguments[which].requires_grad_()
    run = dit_kernels.linear_gelu if gelu else dit_kernels.linear
    got, expected = (
        torch.autograd.grad(run(*arguments, impl=impl).square().sum(), arguments[which])[0]
        for impl in ("auto", "reference")
    )
    assert relative_error(got, expected) < 1e-5
    packed = dit_kernels.PackedLinear(*(a.detach() for a in arguments[1:]))
    with pytest.raises(Unavailable, match="PackedLinear has no backward pass"):
        packed(arguments[0].detach().requires_grad_(), gelu)


def test_a_weight_that_is_a_transpose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its contiguous copy must live until it is packed."""
    call = native.call

    def after_others_took_what_is_free(*arguments: object) -> None:
        taken = [torch.full((64, 2048), torch.nan) for _ in range(4)]
        call(*arguments)
        del taken

    monkeypatch.setattr(native, "call", after_others_took_what_is_free)
    x, weight, bias = random(3, 64), random(64, 2048, seed=1), random(2048, seed=2)
    expected = F.linear(x.double(), weight.double().t(), bias.double())
    assert relative_error(dit_kernels.PackedLinear(weight.t(), bias)(x), expected) < 1e-6
    require_int8()
    layer = dit_kernels.QuantizedLinear(weight.t(), bias, "int8", torch.float32)
    codes = reference.quantize_rows(x, torch.int8)
    straight = dit_kernels.QuantizedLinear(weight.t().contiguous(), bias, "int8", torch.float32)
    assert torch.equal(layer(*codes), straight(*codes))


@pytest.mark.parametrize("own", [True, False], ids=["own_product", "library"])
@pytest.mark.parametrize("gelu", [False, True])
def test_torch_compile_takes_the_linears_whole(
    gelu: bool, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not own:
        monkeypatch.setattr(native_product, "why_not", lambda _: "another processor")
    elif (reason := native_product.why_not(torch.float32)) is not None:
        pytest.skip(reason)
    x, weight, bias = random(2, 5, 64), random(24, 64, seed=1), random(24, seed=2)
    packed = dit_kernels.PackedLinear(weight, bias)
    public = dit_kernels.linear_gelu if gelu else dit_kernels.linear
    calls: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (public, (x, weight, bias)),
        (lambda h: packed(h, gelu), (x,)),
    ]
    if has_int8():
        layer = dit_kernels.QuantizedLinear(weight, bias, "int8", torch.float32)
        codes = reference.quantize_rows(x, torch.int8)
        calls.append((lambda c, s: layer(c, s, gelu), codes))
    for run, arguments in calls:
        compiled = torch.compile(run, backend="eager", fullgraph=True)
        assert relative_error(compiled(*arguments), run(*arguments)) < 1e-5


@pytest.mark.parametrize("make", [quantizer, _Separate], ids=["chosen", "separate"])
def test_a_quantizer_gives_the_codes_of_the_unrounded_norm(
    make: Callable[[str, torch.device], Quantizer],
) -> None:
    quantize = make("int8", torch.device("cpu"))
    norm = (SHIFT, SCALE, 1e-6)
    residual = X + GATE[:, None] * Y
    x = X.clone()
    for (codes, scales), expected in (
        (quantize.rows(X), X),
        (quantize.norm(X, *norm), reference.layernorm_modulate(X, *norm)),
        (quantize.gated_norm(x, Y, GATE, *norm), reference.layernorm_modulate(residual, *norm)),
    ):
        assert codes.dtype == torch.uint8 and scales.shape == (N, T)
        assert torch.equal((codes.int() - 128).abs().amax(-1), torch.full((N, T), 127).int())
        error = ((codes.double() - 128) * scales[..., None] - expected).abs()
        assert (error <= 0.501 * scales[..., None]).all()
    assert relative_error(x, residual) < 1e-6  # in place


@pytest.mark.parametrize("name", CALLS)
def test_torch_compile_keeps_each_operator_whole(name: str) -> None:
    run, arguments = CALLS[name]
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *a: run(*a), backend=backend, fullgraph=True)
    assert_same(compiled(*arguments), run(*arguments))
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum(f"dit_kernels.{name}" in target for target in targets) == 1


def test_torch_export_keeps_operators_with_a_dynamic_batch() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            return dit_kernels.layernorm_modulate(x, shift, scale)

    batch = torch.export.Dim("batch", min=2)
    shapes = ({0: batch}, {0: batch}, {0: batch})
    program = torch.export.export(
        Module(), (X, SHIFT.contiguous(), SCALE.contiguous()), dynamic_shapes=shapes
    )
    assert "dit_kernels.layernorm_modulate" in str(program.graph)
    x, shift, scale = random(4, T, D), random(4, D), random(4, D, seed=1)
    expected = reference.layernorm_modulate(x, shift, scale, 1e-6)
    assert relative_error(program.module()(x, shift, scale), expected) < 1e-5


@pytest.mark.parametrize("name", CALLS)
def test_operators_pass_torchs_own_checks(name: str) -> None:
    _, arguments = CALLS[name]
    extra = {"layernorm_modulate": (1e-6,), "gate_residual_layernorm_modulate": (1e-6,),
             "groupnorm_silu": (1e-6,),
             "layernorm_modulate_quantize": (1e-6, torch.int8),
             "quantize_rows": (torch.int8,)}.get(name, ())  # fmt: skip
    operator = getattr(torch.ops.dit_kernels, name).default
    torch.library.opcheck(operator, (*arguments, *extra), {"impl": "reference"},
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_named_implementations_run_or_raise(name: str) -> None:
    run, arguments = CALLS[name]
    with pytest.raises(ValueError, match=r"^impl 'cuda': choose one of auto, reference, triton"):
        run(*arguments, impl="cuda")
    for impl in ("triton", "native"):
        reason = choose.why_not(impl, name, torch.device("cpu"))
        if reason is None:
            assert_same(run(*arguments, impl=impl), run(*arguments, impl="reference"))
        else:
            with pytest.raises(Unavailable, match=rf"^impl '{impl}': "):
                run(*arguments, impl=impl)


def test_available_names_every_implementation() -> None:
    found = dit_kernels.available()
    assert list(found) == ["reference", "native", "triton"]
    assert all(found.values())


BAD: list[tuple[str, dict[str, object], str]] = [
    ("layernorm_modulate", {"x": random(N, D)}, r"^x has shape \(2, 48\); \(N, T, D\) with"),
    ("layernorm_modulate", {"x": random(N, 0, D)}, r"^x has shape \(2, 0, 48\)"),
    ("layernorm_modulate", {"x": random(N, T, 0)}, r"^x has shape \(2, 5, 0\)"),
    ("layernorm_modulate", {"x": X.int()}, r"^x has dtype torch.int32; allowed: float32"),
    ("layernorm_modulate", {"x": X.transpose(1, 2)}, r"^x of strides .* is not contiguous$"),
    ("layernorm_modulate", {"shift": random(3, D)}, r"^shift has shape \(3, 48\); x needs"),
    ("layernorm_modulate", {"scale": SCALE.half()}, r"^scale has dtype torch.float16"),
    ("layernorm_modulate", {"scale": random(N, 2 * D)[:, ::2]}, r"^scale has stride 2"),
    ("layernorm_modulate", {"scale": torch.empty(N, D, device="meta")}, r"^scale is on meta"),
    ("layernorm_modulate", {"eps": 0.0}, r"^eps 0.0 is not above 0$"),
    ("layernorm_modulate", {"eps": math.nan}, r"^eps nan is not above 0$"),
    ("gate_residual", {"y": random(N, T, 2 * D)}, r"^y has shape \(2, 5, 96\), x has"),
    ("gate_residual", {"y": Y.half()}, r"^y has dtype torch.float16, x has torch.float32$"),
    ("gate_residual", {"gate": random(1, D)}, r"^gate has shape"),
    ("attention", {"num_heads": 5}, r"^num_heads 5 does not divide"),
    ("attention", {"num_heads": 0}, r"^num_heads 0 does not divide"),
    ("attention", {"num_heads": 4}, r"^head dimension 12: multiples of 8 up to 128"),
    ("attention", {"qkv": random(1, 2, 3 * 136), "num_heads": 1}, r"^head dimension 136"),
    ("groupnorm_silu", {"x": random(N, 8, 4, 4)}, r"^x is not in torch.channels_last memory$"),
    ("groupnorm_silu", {"groups": 3}, r"^groups 3 does not divide the 8 channels$"),
    ("groupnorm_silu", {"weight": random(4)}, r"^weight has shape \(4,\)"),
    ("guided_step", {"tokens": random(3, 16, 32)}, r"^tokens has shape \(3, 16, 32\); latents"),
    ("guided_step", {"z": LATENTS.double()}, r"^z has dtype torch.float64"),
    ("guided_step", {"noise": LATENTS[:1]}, r"^noise has shape"),
    ("guided_step", {"coefficients": torch.zeros(8)}, r"^coefficients is torch.float32 \(8,\)"),
    ("guided_step", {"guided_channels": 5}, r"^guided_channels 5 is out of range"),
    ("guided_step", {"patch_size": 3}, r"^patch_size 3 does not divide the latent side 8$"),
    ("layernorm_modulate_quantize", {"dtype": torch.int16}, r"^dtype torch.int16: choose"),
    ("quantize_rows", {"dtype": torch.uint8}, r"^dtype torch.uint8: choose torch.int8 or"),
    ("quantize_rows", {"x": X.double()}, r"^x has dtype torch.float64; allowed: float32"),
    ("quantize_rows", {"x": torch.tensor(1.0)}, r"^x has shape \(\); \(…, D\) with D > 0"),
    ("quantize_rows", {"x": random(N, 0)}, r"^x has shape \(2, 0\)"),
    ("quantize_rows", {"x": X.transpose(1, 2)}, r"^x of strides .* is not contiguous$"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), BAD)
def test_bad_arguments(name: str, change: dict[str, object], message: str) -> None:
    import inspect

    run, arguments = CALLS[name]
    names = list(inspect.signature(run).parameters)
    with pytest.raises(ValueError, match=message) as error:
        run(**(dict(zip(names, arguments, strict=False)) | change))
    assert "\n" not in str(error.value)
