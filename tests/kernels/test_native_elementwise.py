"""The native GELU, its codes and the epilogue of an integer product against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from native_levels import DTYPES, isa, needs_library, one_off, threads
from numerics import assert_close_to_reference
from torch import Tensor

from dit_kernels import reference
from dit_kernels.cpu import operators as native

pytestmark = needs_library
__all__ = ["isa", "threads"]  # fixtures


def exact_gelu(x: Tensor) -> Tensor:
    return F.gelu(x.double(), approximate="tanh")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_is_as_exact_as_torchs_everywhere(isa: str, dtype: torch.dtype) -> None:
    x = torch.linspace(-12, 12, 24 * 1024).to(dtype)
    actual, expected = native.gelu(x), reference.gelu(x)
    for part in range(24):  # not only where |x| is great
        here = slice(part * 1024, (part + 1) * 1024)
        exact = exact_gelu(x[here])
        if (exact != 0).any() and not torch.equal(actual[here], expected[here]):
            assert_close_to_reference(actual[here], exact, same_dtype=expected[here])


def test_float32_gelu_of_positive_numbers_to_the_last_places(isa: str) -> None:
    x = torch.rand(1 << 16, generator=torch.Generator().manual_seed(0)) * 20
    relative = (native.gelu(x).double() / exact_gelu(x) - 1).abs()
    assert relative.max() < 4 * 2**-24


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tail_rounds_as_whole_vectors_do(isa: str, dtype: torch.dtype) -> None:
    x = torch.randn(80, generator=torch.Generator().manual_seed(1)).mul(3).to(dtype)
    whole = native.gelu(x)
    for count in range(1, 80):
        assert torch.equal(native.gelu(x[:count].clone()), whole[:count]), count
        assert torch.equal(native.gelu(x[count:]), whole[count:]), count


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_of_what_is_great_or_not_finite(isa: str, dtype: torch.dtype) -> None:
    big = torch.finfo(dtype).max
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, big, -big, 6e4, -6e4, 1e-7])
    x = x.to(dtype).repeat(3)
    actual, expected = native.gelu(x), reference.gelu(x)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 100_003])
def test_gelu_in_place_of_any_length(isa: str, threads: int, count: int) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(count)).bfloat16()
    expected = native.gelu(x)
    moved = one_off((count,), torch.bfloat16).copy_(x)
    assert native.gelu(moved, out=moved) is moved
    assert torch.equal(moved, expected)
    assert native.gelu(x.new_empty(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize(("dtype", "out_dtype"), [
    (torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
])  # fmt: skip
def test_bias_gelu(
    isa: str, dtype: torch.dtype, out_dtype: torch.dtype, bias_dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 7, 45, generator=generator).mul(3).to(dtype)
    bias = torch.randn(45, generator=generator).to(bias_dtype)
    exact = exact_gelu(x.double() + bias.double())
    same = F.gelu(x.float() + bias.float(), approximate="tanh").to(out_dtype)
    actual = native.bias_gelu(x, bias, out_dtype)
    assert actual.dtype == out_dtype
    assert_close_to_reference(actual, exact, same_dtype=same)
    if dtype == out_dtype:
        assert native.bias_gelu(x, bias, out=x) is x
        assert torch.equal(x, actual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [36, 4608])
def test_gelu_quantize(isa: str, dtype: torch.dtype, d: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, d, generator=generator).mul(2).to(dtype)
    bias = torch.randn(d, generator=generator)
    for given in (None, bias, bias.to(dtype)):
        exact = exact_gelu(x.double() if given is None else x.double() + given.double())
        codes, scales = native.gelu_quantize(x, given)
        unsigned, again = native.gelu_quantize(x, given, torch.uint8)
        assert torch.equal(scales, again)
        assert torch.equal(codes.int() + 128, unsigned.int())
        torch.testing.assert_close(scales.double(), exact.abs().amax(-1) / 127, rtol=1e-4, atol=0)
        steps = codes.double() - exact / scales.double().unsqueeze(-1)
        assert steps.abs().max() <= 0.51  # bfloat16's quick exponential is good to 1 in 10⁴


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("cols", [36, 1152])
def test_dequantize_the_product_of_codes(
    isa: str, dtype: torch.dtype, gelu: bool, cols: int
) -> None:
    generator = torch.Generator().manual_seed(cols)
    left = torch.randint(0, 256, (9, 64), generator=generator)  # codes + 128
    right = torch.randint(-127, 128, (64, cols), generator=generator)
    rows, columns = torch.rand(9, generator=generator), torch.rand(cols, generator=generator)
    rows, columns = rows / 1000, columns / 100
    bias = torch.randn(cols, generator=generator)
    acc, offset = (left @ right).int(), (128 * right.sum(0)).int()
    exact = ((left - 128) @ right).double() * rows.double()[:, None] * columns.double()
    exact = exact + bias.double()
    exact = exact_gelu(exact) if gelu else exact
    same = exact.to(dtype)
    for given in (acc, acc.float()):
        actual = native.dequantize_rows(
            given, rows, bias, gelu, col_scales=columns, col_offset=offset, dtype=dtype
        )
        assert actual.dtype == dtype
        if dtype == torch.float32:
            assert_close_to_reference(actual, exact, tolerance=5e-7)
        else:
            assert_close_to_reference(actual, exact, same_dtype=same)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", [False, True])
def test_dequantize_in_place(isa: str, dtype: torch.dtype, gelu: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(6, 45, generator=generator).to(dtype)
    scales, bias = torch.rand(6, generator=generator), torch.randn(45, generator=generator)
    bias = bias.to(dtype)
    exact = x.double() * scales.double()[:, None] + bias.double()
    same = x.float() * scales[:, None] + bias.float()
    if gelu:
        exact, same = exact_gelu(exact), F.gelu(same, approximate="tanh")
    assert native.dequantize_rows(x, scales, bias, gelu, out=x) is x
    assert_close_to_reference(x, exact, same_dtype=same.to(dtype))
