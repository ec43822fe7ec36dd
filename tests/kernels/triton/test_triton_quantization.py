"""The quantising kernels under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_close_to_reference
from operator_checks import launcher, modulations, random
from torch import Tensor
from triton_workers import interpreted

from dit_kernels import reference

CODES = [torch.int8, torch.float8_e4m3fn]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _value(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.double() * scales.double()[..., None]


def _check_codes(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    codes, scales = actual
    assert codes.dtype == expected[0].dtype and scales.dtype == torch.float32
    torch.testing.assert_close(scales, expected[1], rtol=1e-6, atol=0)
    # A value that lies at the border of two codes may fall to either side.
    different = codes.double() != expected[0].double()
    assert different.double().mean() < 1e-3


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [384, 1152])
@interpreted
def test_rows(width, dtype, codes):
    x = random(2, 5, width, dtype=dtype)
    x[0, 0] = 0
    actual, expected = launcher("quantize_rows")(x, codes), reference.quantize_rows(x, codes)
    assert torch.equal(actual[0].float(), expected[0].float())
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [384, 768, 1024, 1152])
@interpreted
def test_layernorm_modulate_quantize(width, dtype, codes):
    x = random(2, 3, width, dtype=dtype) + 0.5
    shift, scale = modulations(2, width, 2, dtype)
    actual = launcher("layernorm_modulate_quantize")(x, shift, scale, 1e-6, codes)
    expected = reference.layernorm_modulate_quantize(x, shift, scale, 1e-6, codes)
    _check_codes(actual, expected)
    exact = reference.layernorm_modulate(x.double(), shift.double(), scale.double(), 1e-6)
    assert_close_to_reference(_value(*actual), exact, same_dtype=_value(*expected))


@pytest.mark.parametrize("tokens", [1, 37])
@interpreted
def test_ragged_tokens(tokens):
    x = random(2, tokens, 96)
    shift, scale = modulations(2, 96, 2, torch.float32)
    _check_codes(
        launcher("layernorm_modulate_quantize")(x, shift, scale, 1e-6, torch.int8),
        reference.layernorm_modulate_quantize(x, shift, scale, 1e-6, torch.int8),
    )


@interpreted
def test_halves_round_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -127.0]])
    codes, scales = launcher("quantize_rows")(x, torch.int8)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, 126, -127]]
    assert scales.tolist() == [1.0]


@interpreted
def test_nan_and_infinity_reach_the_scale():
    x = random(4, 384)
    x[0, 3], x[1, 300], x[2, 5] = float("nan"), float("inf"), float("-inf")
    for dtype in CODES:
        actual, expected = launcher("quantize_rows")(x, dtype), reference.quantize_rows(x, dtype)
        torch.testing.assert_close(actual[1], expected[1], equal_nan=True)
        torch.testing.assert_close(_value(*actual), _value(*expected), equal_nan=True)


@interpreted
def test_nothing_to_do_and_given_buffers():
    codes, scales = launcher("quantize_rows")(torch.zeros(0, 5, 96), torch.int8)
    assert codes.shape == (0, 5, 96) and scales.shape == (0, 5)
    x = random(2, 5, 96)
    out = torch.empty(2, 5, 96, dtype=torch.int8), torch.empty(2, 5)
    results = launcher("quantize_rows")(x, torch.int8, out=out)
    assert all(a is b for a, b in zip(results, out, strict=True))
    assert torch.equal(out[0], reference.quantize_rows(x, torch.int8)[0])


@interpreted
def test_float8_is_refused_by_an_old_gpu():
    from unittest.mock import patch

    from dit_kernels.triton.quantize_rows import check_codes_on

    with patch("torch.cuda.get_device_capability", return_value=(8, 6)):
        check_codes_on(torch.device("cuda"), torch.int8)
        with pytest.raises(ValueError, match=r"8\.9 or later, cuda has 8\.6"):
            check_codes_on(torch.device("cuda"), torch.float8_e4m3fn)
