"""The launchers on a GPU: full sizes, against float64, and inside a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from numerics import exact_float32
from operator_checks import check, launcher, random
from torch import Tensor

from dit_kernels import reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    with exact_float32():
        yield


def _modulation_case(dtype: torch.dtype, width: int = 1152, tokens: int = 256) -> list[Tensor]:
    x, y = (random(4, tokens, width, dtype=dtype, seed=s).cuda() for s in (0, 1))
    return [x, y, *random(4, 6 * width, dtype=dtype, seed=9).cuda().chunk(6, dim=1)[:3]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 37, 256, 1024])
@pytest.mark.parametrize("width", [384, 768, 1024, 1152])
def test_row_kernels(width, tokens, dtype):
    x, y, gate, shift, scale = _modulation_case(dtype, width, tokens)
    check("layernorm_modulate", x, shift, scale, 1e-6)
    check("gate_residual", x, y, gate)
    check("gate_residual_layernorm_modulate", x, y, gate, shift, scale, 1e-6)


@pytest.mark.parametrize("tokens", [1, 37, 256, 1024])
@pytest.mark.parametrize(("heads", "d"), [(6, 64), (16, 72), (4, 32), (2, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 16])
def test_attention(n, dtype, heads, d, tokens):
    qkv = random(n, tokens, 3 * heads * d, dtype=dtype).cuda()
    check("attention", qkv, heads)
    if dtype != torch.float32 and torch.cuda.get_device_capability() >= (9, 0):
        check("attention_tma", qkv, heads, like="attention")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "side"), [(128, 256), (256, 128), (512, 32)])
def test_groupnorm_silu(channels, side, dtype):
    x = random(2, channels, side, side, dtype=dtype).cuda()
    x = x.to(memory_format=torch.channels_last)
    check("groupnorm_silu", x, 32, *random(2, channels, dtype=dtype, seed=1).cuda(), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_guided_step_and_gelu(dtype):
    check("guided_step", *_guided_step_case(dtype))
    check("gelu", random(2, 256, 4608, dtype=dtype).cuda())


def _guided_step_case(dtype: torch.dtype) -> list[Any]:
    tokens = random(8, 256, 32, dtype=dtype).cuda()
    latents = random(3, 4, 4, 32, 32, seed=1).cuda()
    scale = torch.tensor([1.0, 4.0, 1.5, 7.5]).cuda()
    return [tokens, *latents, scale, random(9, seed=2).cuda(), 3, 2]


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
def test_quantize_rows(codes):
    if codes != torch.int8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")
    x = random(4, 37, 1152, dtype=torch.bfloat16)
    actual = [r.cpu() for r in launcher("quantize_rows")(x.cuda(), codes)]
    expected = reference.quantize_rows(x, codes)
    assert torch.equal(actual[0].float(), expected[0].float())
    assert torch.equal(actual[1], expected[1])


def _graph_cases() -> dict[str, Callable[[], Any]]:
    x, y, gate, shift, scale = _modulation_case(torch.bfloat16)
    qkv = random(2, 256, 3 * 1152, dtype=torch.bfloat16).cuda()
    step = _guided_step_case(torch.bfloat16)
    image = random(1, 128, 64, 64).cuda().to(memory_format=torch.channels_last)
    affine = random(2, 128).cuda()
    return {
        "layernorm_modulate": lambda: launcher("layernorm_modulate")(x, shift, scale, 1e-6),
        "gate_residual": lambda: launcher("gate_residual")(x, y, gate),
        "gate_residual_layernorm_modulate": lambda: launcher("gate_residual_layernorm_modulate")(
            x, y, gate, shift, scale, 1e-6
        ),
        "layernorm_modulate_quantize": lambda: launcher("layernorm_modulate_quantize")(
            x, shift, scale, 1e-6, torch.int8
        ),
        "attention": lambda: launcher("attention")(qkv, 16),
        "attention_tma": lambda: launcher("attention_tma")(qkv, 16),
        "guided_step": lambda: launcher("guided_step")(*step),
        "groupnorm_silu": lambda: launcher("groupnorm_silu")(image, 32, *affine, 1e-6),
        "gelu": lambda: launcher("gelu")(x),
    }


@pytest.mark.parametrize(
    "operator",
    [
        "layernorm_modulate",
        "gate_residual",
        "gate_residual_layernorm_modulate",
        "layernorm_modulate_quantize",
        "attention",
        "attention_tma",
        "guided_step",
        "groupnorm_silu",
        "gelu",
    ],
)
def test_capture_in_a_graph(operator):
    if operator == "attention_tma" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("descriptors need compute capability 9.0")
    run = _graph_cases()[operator]
    expected = run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)
