"""The row kernels under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from operator_checks import check, check_special, launcher, modulations, random
from triton_workers import interpreted

WIDTHS = [384, 768, 1024, 1152]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _check_all(n: int, tokens: int, width: int, dtype: torch.dtype, wide: bool = False) -> None:
    x, y = (random(n, tokens, width, dtype=dtype, seed=s) + 0.5 for s in (0, 1))
    gate, shift, scale = modulations(n, width, 3, torch.float32 if wide else dtype)
    check("layernorm_modulate", x, shift, scale, 1e-6)
    check("gate_residual", x, y, gate)
    check("gate_residual_layernorm_modulate", x, y, gate, shift, scale, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@interpreted
def test_published_widths(width, dtype):
    _check_all(2, 3, width, dtype)


@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("dtype", DTYPES)
@interpreted
def test_ragged_tokens(tokens, dtype):
    _check_all(1, tokens, 384, dtype)


@interpreted
def test_an_image_of_256_pixels():
    x, y = (random(1, 256, 384, dtype=torch.bfloat16, seed=s) for s in (0, 1))
    gate, shift, scale = modulations(1, 384, 3, torch.bfloat16)
    check("gate_residual_layernorm_modulate", x, y, gate, shift, scale, 1e-6)


@pytest.mark.parametrize("width", [8, 24, 200, 250, 2048])
@interpreted
def test_other_widths(width):
    _check_all(2, 5, width, torch.float32)


@interpreted
def test_modulation_in_float32_of_a_bfloat16_model():
    _check_all(2, 3, 384, torch.bfloat16, wide=True)


@interpreted
def test_modulation_of_one_row_for_all_images():
    x = random(3, 5, 384)
    shift, scale = (m.expand(3, -1) for m in modulations(1, 384, 2, torch.float32))
    check("layernorm_modulate", x, shift, scale, 1e-6)


@pytest.mark.parametrize("shape", [(0, 5, 384), (2, 0, 384)])
@interpreted
def test_nothing_to_do(shape):
    x = torch.zeros(shape)
    gate, shift, scale = modulations(shape[0], 384, 3, torch.float32)
    assert launcher("layernorm_modulate")(x, shift, scale, 1e-6).shape == shape
    assert launcher("gate_residual")(x, x, gate).shape == shape
    both = launcher("gate_residual_layernorm_modulate")(x, x, gate, shift, scale, 1e-6)
    assert [r.shape for r in both] == [shape, shape]


@interpreted
def test_results_in_given_buffers():
    x, y = random(2, 5, 384), random(2, 5, 384, seed=1)
    gate, shift, scale = modulations(2, 384, 3, torch.float32)
    check("layernorm_modulate", x, shift, scale, 1e-6, out=torch.empty_like(x))
    buffer, given = torch.empty_like(x), x.clone()
    fused = launcher("gate_residual_layernorm_modulate")
    expected = fused(x, y, gate, shift, scale, 1e-6)
    residual, normed = fused(given, y, gate, shift, scale, 1e-6, out=(given, buffer))
    assert residual is given and normed is buffer
    torch.testing.assert_close((residual, normed), expected, rtol=0, atol=0)
    given = x.clone()
    assert launcher("gate_residual")(given, y, gate, out=given) is given
    torch.testing.assert_close(given, expected[0], rtol=0, atol=0)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
@interpreted
def test_nan_and_infinity_stay_in_their_rows(special):
    x, y = random(2, 5, 384), random(2, 5, 384, seed=1)
    x[0, 1, 7] = y[1, 2, 300] = special
    gate, shift, scale = modulations(2, 384, 3, torch.float32)
    check_special("layernorm_modulate", x, shift, scale, 1e-6)
    check_special("gate_residual", x, y, gate)
    check_special("gate_residual_layernorm_modulate", x, y, gate, shift, scale, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@interpreted
def test_gelu(dtype):
    check("gelu", random(3, 700, dtype=dtype) * 3)
    ends = torch.tensor([0.0, -0.0, 40.0, -40.0, 1e20, -1e20, float("inf"), float("nan")])
    check_special("gelu", ends.to(dtype))
