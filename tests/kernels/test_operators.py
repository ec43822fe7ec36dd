"""The public operators: references against closed forms, refusals, torch.compile and export."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import as_tuple, random
from numerics import relative_error
from torch import Tensor, nn

import dit_kernels
from dit_kernels import Unavailable, dispatch, reference
from dit_kernels.quantized import FP8

N, T, D = 2, 5, 48
X, Y, GATE, SHIFT, SCALE = cases.row_inputs(N, T, D, torch.float32)
IMAGES = cases.images((N, 8, 4, 4), torch.float32)
WEIGHT, BIAS = random(2, 8, seed=3)
STEP = cases.step_inputs(N, 8, 2, True, True, torch.float32)
LATENTS = STEP[1]
CALLS: dict[str, tuple[Any, ...]] = {
    "layernorm_modulate": (X, SHIFT, SCALE),
    "gate_residual_layernorm_modulate": (X, Y, GATE, SHIFT, SCALE),
    "gate_residual": (X, Y, GATE),
    "attention": (random(N, T, 3 * D), 2),
    "groupnorm_silu": (IMAGES, 4, WEIGHT, BIAS),
    "guided_step": (*STEP, 3, 2),
    "layernorm_modulate_quantize": (X, SHIFT, SCALE),
    "quantize_rows": (X,),
}
ALL = pytest.mark.parametrize("name", CALLS)


def assert_same(actual: Any, expected: Any) -> None:
    for a, b in zip(as_tuple(actual), as_tuple(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert relative_error(a, b) < 1e-5 if a.is_floating_point() else (a - b).abs().max() <= 1


@ALL
def test_named_implementations_run_or_raise_and_compile_to_one_node(name: str) -> None:
    run, arguments = getattr(dit_kernels, name), CALLS[name]
    expected = run(*arguments, impl="reference")
    assert_same(run(*arguments), expected)
    with pytest.raises(ValueError, match=r"^impl 'cuda': choose one of auto, reference, triton"):
        run(*arguments, impl="cuda")
    for impl in ("triton", "native"):
        if dispatch.why_not(impl, name, torch.device("cpu")) is None:
            assert_same(run(*arguments, impl=impl), expected)
        else:
            with pytest.raises(Unavailable, match=rf"^impl '{impl}': "):
                run(*arguments, impl=impl)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *a: run(*a), backend=backend, fullgraph=True)
    assert_same(compiled(*arguments), expected)
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum(f"dit_kernels.{name}" in target for target in targets) == 1
    operator = getattr(torch.ops.dit_kernels, name).default
    torch.library.opcheck(operator, arguments, {"impl": "reference"},
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip


def test_references_equal_what_the_model_does() -> None:
    summed = X.double() + GATE.double()[:, None] * Y.double()
    modulate = SHIFT.double()[:, None], 1 + SCALE.double()[:, None]
    both = [F.layer_norm(v, (D,), eps=1e-6) * modulate[1] + modulate[0]
            for v in (X.double(), summed)]  # fmt: skip
    qkv = random(N, T, 3 * D).double()
    q, k, v = qkv.view(N, T, 3, 2, D // 2).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, T, D)
    norm = nn.GroupNorm(4, 8, eps=1e-6).double()
    norm.weight.data, norm.bias.data = WEIGHT.double(), BIAS.double()
    wide = Y.double()
    cubic = wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    fused = reference.gate_residual_layernorm_modulate(X, Y, GATE, SHIFT, SCALE, 1e-6)
    for actual, expected in (
        (reference.layernorm_modulate(X, SHIFT, SCALE, 1e-6), both[0]),
        (reference.gate_residual(X, Y, GATE), summed),
        (fused[0], summed),
        (fused[1], both[1]),
        (reference.attention(qkv.float(), 2), attended),
        (reference.groupnorm_silu(IMAGES, 4, WEIGHT, BIAS, 1e-6), F.silu(norm(IMAGES.double()))),
        (reference.gelu(Y), 0.5 * cubic),
    ):
        assert relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("shape", [(33,), (2, 3, 5, 64), (0, 8)], ids=str)
def test_rows_are_quantised_within_half_a_step(shape: tuple[int, ...]) -> None:
    """Against float64: the largest of a row is code 127, the others at most half a step away."""
    x = random(*shape) * 5
    codes, scales = dit_kernels.quantize_rows(x, impl="reference")
    fp8, fp8_scales = dit_kernels.quantize_rows(x, FP8)
    assert codes.dtype == torch.int8 and fp8.dtype == FP8 and fp8_scales.shape == x.shape[:-1]
    if x.numel() > 0:
        shifted, _ = reference.quantize_rows(x, torch.uint8)
        cases.check_codes("quantize_rows", (x,), (codes, scales))
        cases.check_codes("quantize_rows", (x,), (shifted, scales))
        assert (codes.abs().amax(-1) == 127).all()
        restored = fp8.double() * fp8_scales.double().unsqueeze(-1)
        assert relative_error(restored, x.double()) < 2**-4


@pytest.mark.parametrize("name", ["layernorm_modulate", "attention", "groupnorm_silu"])
def test_gradients_come_from_the_reference_and_are_never_dropped(name: str) -> None:
    run, (x, *rest) = getattr(dit_kernels, name), CALLS[name]
    x = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(run(x, *rest).square().sum(), x)
    (expected,) = torch.autograd.grad(run(x, *rest, impl="reference").square().sum(), x)
    assert relative_error(got, expected) < 1e-6
    with torch.no_grad():
        assert not run(x, *rest).requires_grad
    for impl in ("triton", "triton-tma", "native"):  # whether it could run here or not
        with pytest.raises(Unavailable, match=f"{name} has no backward pass there"):
            run(x, *rest, impl=impl)


def test_references_compute_in_float32_inside_autocast() -> None:
    product = X, random(7, D), random(7)
    for run, arguments in (
        (dit_kernels.attention, CALLS["attention"]), (dit_kernels.linear, product)
    ):  # fmt: skip
        expected = run(*arguments, impl="reference")
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(run(*arguments, impl="reference"), expected)


def test_torch_export_keeps_operators_with_a_dynamic_batch() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            return dit_kernels.layernorm_modulate(x, shift, scale)

    arguments = (X, SHIFT.contiguous(), SCALE.contiguous())
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Module(), arguments, dynamic_shapes=({0: batch},) * 3)
    assert "dit_kernels.layernorm_modulate" in str(program.graph)
    larger = (random(4, T, D), random(4, D), random(4, D, seed=1))
    expected = reference.layernorm_modulate(*larger, 1e-6)
    assert relative_error(program.module()(*larger), expected) < 1e-5


# One row for each check of an operator, and for each thing that checks.check looks at.
BAD: list[tuple[str, dict[str, object], str]] = [
    ("layernorm_modulate", {"x": random(N, D)}, r"^x is .*\(2, 48\) on cpu; .* \(N, T, D\) is"),
    ("layernorm_modulate", {"x": X.int()}, r"^x is torch.int32 .*; float32, bfloat16, float16 \("),
    ("layernorm_modulate", {"x": X.transpose(1, 2)}, r"^x of strides .* is not contiguous$"),
    ("layernorm_modulate", {"shift": random(3, D)}, r"^shift is .*\(3, 48\) .*\(2, 48\) on cpu"),
    ("layernorm_modulate", {"scale": SCALE.half()}, r"^scale is torch.float16 .*; float32 \("),
    ("layernorm_modulate", {"scale": random(N, 2 * D)[:, ::2]}, r"^scale has stride 2"),
    ("layernorm_modulate", {"scale": torch.empty(N, D, device="meta")}, r"^scale is .* on meta;"),
    ("layernorm_modulate", {"eps": math.nan}, r"^eps nan is not above 0$"),
    ("gate_residual", {"y": Y.half()}, r"^y is torch.float16 .*; float32 \(2, 5, 48\)"),
    ("attention", {"num_heads": 5}, r"^num_heads 5 is no integer that divides"),
    ("attention", {"num_heads": 4}, r"^head dimension 12: multiples of 8 up to 128"),
    ("attention", {"qkv": random(1, 2, 3 * 136), "num_heads": 1}, r"^head dimension 136"),
    ("groupnorm_silu", {"x": random(N, 8, 4, 4)}, r"^x of strides .* torch.channels_last memory$"),
    ("groupnorm_silu", {"groups": 3}, r"^groups 3 does not divide the 8 channels$"),
    ("guided_step", {"tokens": random(3, 16, 32)}, r"^tokens has shape \(3, 16, 32\); latents"),
    ("guided_step", {"z": LATENTS[..., :4]}, r"^z is .* \(2, 4, 8, 4\)"),
    ("guided_step", {"coefficients": torch.zeros(8)}, r"^coefficients is torch.float32 \(8,\)"),
    ("guided_step", {"guided_channels": 5}, r"^guided_channels 5 is out of range"),
    ("guided_step", {"patch_size": 3}, r"^patch_size 3 does not divide the latent side 8$"),
    ("layernorm_modulate_quantize", {"dtype": torch.int16}, r"^dtype torch.int16: choose"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), BAD)
def test_bad_arguments(name: str, change: dict[str, object], message: str) -> None:
    run = getattr(dit_kernels, name)
    arguments = dict(zip(inspect.signature(run).parameters, CALLS[name], strict=False))
    with pytest.raises(ValueError, match=message) as error:
        run(**(arguments | change))
    assert "\n" not in str(error.value)
