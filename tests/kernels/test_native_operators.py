"""The native operators on every instruction set that the machine has, against float64."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import EPS
from native_levels import ALL_DTYPES, isa, needs_library, one_off, threads
from numerics import assert_close_to_reference
from torch import Tensor

from dit_kernels import reference
from dit_kernels.cpu import operators as native

pytestmark = needs_library
__all__ = ["isa", "threads"]  # fixtures
HEADS = 2


@ALL_DTYPES
@pytest.mark.parametrize("operator", sorted(cases.CASES.keys() - cases.TRITON_ONLY))
def test_every_case_against_float64(isa: str, operator: str, dtype: torch.dtype) -> None:
    run = getattr(native, operator)
    cases.check(run, operator, dtype)
    cases.check_empty(run, operator, dtype)
    if operator in cases.TO_FLOATS:
        cases.check_special(run, operator, dtype)


@ALL_DTYPES
@pytest.mark.parametrize("operator", cases.OVERWRITTEN)
def test_results_over_arguments_at_any_address(isa: str, operator: str, dtype: torch.dtype) -> None:
    def copy(v: Tensor) -> Tensor:
        return one_off(v) if v.numel() > 9 else v.clone()  # float32 scalars need their alignment

    cases.check_given_memory(getattr(native, operator), operator, dtype, copy)


THREADED: dict[str, tuple[Any, ...]] = {
    "gate_residual_layernorm_modulate": (*cases.row_inputs(3, 50, 1152, torch.bfloat16), EPS),
    "attention": (cases.qkv_of(3, 300, 2, 72, torch.bfloat16), 2),
    "groupnorm_silu": (
        cases.images((3, 64, 48, 48), torch.bfloat16), 16, *cases.random(2, 64, seed=2), EPS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("operator", THREADED)
def test_an_image_has_the_same_bits_on_any_threads_and_beside_any_others(
    isa: str, operator: str, threads: None
) -> None:
    run, arguments = getattr(native, operator), THREADED[operator]
    torch.set_num_threads(1)
    whole = cases.as_tuple(run(*arguments))
    for count in (2, 7):
        torch.set_num_threads(count)
        for result, expected in zip(cases.as_tuple(run(*arguments)), whole, strict=True):
            assert torch.equal(result, expected), count
    last = [v[2:] if isinstance(v, Tensor) and v.shape[0] == 3 else v for v in arguments]
    for result, expected in zip(cases.as_tuple(run(*last)), whole, strict=True):
        assert torch.equal(result[0], expected[2])


def test_eps_is_the_one_that_is_given(isa: str) -> None:
    """Rows of little variance: mean 0 and 1/16² by construction, so that eps decides."""
    x = (torch.tensor([1.0, -1.0]).repeat(24) / 16).expand(1, 3, 48).contiguous()
    zero, eps = torch.zeros(1, 48), 1e-3
    codes, scales = native.layernorm_modulate_quantize(x, zero, zero, eps)
    for normed in (
        native.layernorm_modulate(x, zero, zero, eps),
        codes * scales.unsqueeze(-1),  # the greatest value has the code ±127
    ):
        expected = x.double() / (1 / 256 + eps) ** 0.5
        torch.testing.assert_close(normed.double(), expected, rtol=1e-5, atol=0)


@ALL_DTYPES
def test_the_norm_reads_the_rounded_residual_and_so_do_its_codes(
    isa: str, dtype: torch.dtype
) -> None:
    x, y, gate, shift, scale = cases.row_inputs(2, 19, 384, dtype)
    residual, normed = native.gate_residual_layernorm_modulate(x, y, gate, shift, scale, EPS)
    assert torch.equal(residual, native.gate_residual(x, y, gate))
    assert torch.equal(normed, native.layernorm_modulate(residual, shift, scale, EPS))
    for codes_dtype in (torch.int8, torch.uint8):
        expected = native.layernorm_modulate_quantize(residual, shift, scale, EPS, codes_dtype)
        own = x.clone()
        found = native.gate_residual_layernorm_modulate_quantize(
            own, y, gate, shift, scale, EPS, codes_dtype,
            out=(own, *(torch.empty_like(v) for v in expected)),
        )  # fmt: skip
        assert found[0] is own
        for a, b in zip(found, (residual, *expected), strict=True):
            assert torch.equal(a, b)


def test_codes_of_zeros_and_of_values_that_are_not_finite(isa: str) -> None:
    x = torch.zeros(5, 40)
    x[1, 7], x[2, 3], x[3, 39] = torch.nan, torch.inf, -torch.inf
    x[4, 0] = 2
    codes, scales = native.quantize_rows(x)
    assert not codes[:3].any() and codes[4].tolist() == [127] + [0] * 39
    _, expected = reference.quantize_rows(x, torch.int8)
    torch.testing.assert_close(scales, expected, equal_nan=True)


def exact_gelu(x: Tensor) -> Tensor:
    return F.gelu(x.double(), approximate="tanh")


@ALL_DTYPES
def test_gelu_of_small_and_great_numbers_and_in_tails(isa: str, dtype: torch.dtype) -> None:
    x = torch.linspace(-12, 12, 24 * 1024).to(dtype)
    actual, expected = native.gelu(x), reference.gelu(x)
    for here in torch.arange(24 * 1024).split(1024):  # each part has a scale of its own
        exact = exact_gelu(x[here])
        if (exact != 0).any() and not torch.equal(actual[here], expected[here]):
            assert_close_to_reference(actual[here], exact, same_dtype=expected[here])
    if dtype == torch.float32:  # to the last places
        x = torch.rand(1 << 16, generator=torch.Generator().manual_seed(0)) * 20
        assert (native.gelu(x).double() / exact_gelu(x) - 1).abs().max() < 4 * 2**-24
    x = cases.random(80, dtype=dtype) * 3
    whole = native.gelu(x)
    for count in range(1, 80):  # tails round as whole vectors do
        assert torch.equal(native.gelu(x[count:]), whole[count:]), count


@pytest.mark.parametrize("gelu", [False, True])
@ALL_DTYPES
def test_dequantize_in_place(isa: str, dtype: torch.dtype, gelu: bool) -> None:
    for d, bias_dtype in ((45, dtype), (1152, torch.float32)):  # a tail; XL's width
        x, scales = cases.random(9, d, dtype=dtype), cases.random(9, seed=1).abs()
        bias = cases.random(d, dtype=bias_dtype, seed=2)
        exact = x.double() * scales.double()[:, None] + bias.double()
        same = x.float() * scales[:, None] + bias.float()
        if gelu:
            exact, same = exact_gelu(exact), F.gelu(same, approximate="tanh")
        assert native.dequantize_rows(x, scales, bias, gelu, out=x) is x
        assert_close_to_reference(x, exact, same_dtype=same.to(dtype))


def test_group_norm_of_a_mean_far_above_the_deviation(isa: str) -> None:
    x, weight, bias = cases.images((1, 32, 64, 64), torch.float32, 1000.0), *cases.random(2, 32)
    exact = reference.groupnorm_silu(x.double(), 8, weight.double(), bias.double(), EPS)
    actual = native.groupnorm_silu(x, 8, weight, bias, EPS)
    same = reference.groupnorm_silu(x, 8, weight, bias, EPS)
    assert_close_to_reference(actual, exact, same_dtype=same)
    assert_close_to_reference(actual, exact, tolerance=1e-4)


@ALL_DTYPES
@pytest.mark.parametrize(
    ("p", "c", "s", "d"), [(2, 4, 16, 384), (4, 3, 12, 36)]  # S/2; half a vector left
)  # fmt: skip
def test_embed(isa: str, dtype: torch.dtype, p: int, c: int, s: int, d: int) -> None:
    z, kernel = cases.random(3, c, s, s), cases.random(d, c, p, p, seed=1)
    bias, positions = cases.random(d, seed=2), cases.random((s // p) ** 2, d, seed=3)
    weight = kernel.flatten(1).t().contiguous()
    wide = F.conv2d(z.double(), kernel.double(), bias.double(), stride=p)
    exact = wide.flatten(2).transpose(1, 2) + positions
    out = torch.empty(exact.shape, dtype=dtype)
    assert native.embed(z, weight, bias, positions, p, out=out) is out
    step = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert ((out.double() - exact).abs() <= step * exact.abs() + 1e-4).all()


# Attention


@ALL_DTYPES
@pytest.mark.parametrize("t", [37, 300])  # one block of keys, and several
def test_scores_that_are_infinite_or_large(isa: str, t: int, dtype: torch.dtype) -> None:
    d = 64
    qkv = cases.qkv_of(2, t, HEADS, d, dtype)
    q, k, v = qkv.view(2, t, 3, HEADS, d).unbind(2)
    q[0, 5], k[0, :, 1] = float("inf"), -1
    actual = native.attention(qkv, HEADS).view(2, t, HEADS, d)
    assert actual[0, 5, 1].isnan().all() and actual[0, :5].isfinite().all()
    large = 200 if dtype == torch.float16 else 1e18  # scores of 3e5 and 8e36
    q[:], k[:] = large, large
    exact, same_dtype = reference.attention(qkv.double(), HEADS), reference.attention(qkv, HEADS)
    assert_close_to_reference(native.attention(qkv, HEADS), exact, same_dtype=same_dtype)
    k[:, :-1] = -large  # the last key has all the weight
    last = v[:, -1:].expand(2, t, HEADS, d).reshape(2, t, -1)
    assert torch.equal(native.attention(qkv, HEADS), last)


@ALL_DTYPES
def test_equal_scores_of_any_size_weigh_alike(isa: str, dtype: torch.dtype) -> None:
    """Whichever way their scale was rounded."""
    t, d = 40, 64
    qkv = cases.qkv_of(2, t, HEADS, d, dtype)
    q, k, v = qkv.view(2, t, 3, HEADS, d).unbind(2)
    mean = v.double().mean(1, keepdim=True).expand(2, t, HEADS, d).reshape(2, t, -1)
    for exponent in range(33 if dtype == torch.float16 else 140):
        q[:] = k[:] = 2 ** (exponent / 4)  # scores of up to 6e5, or of 2e22
        actual = native.attention(qkv, HEADS)
        assert_close_to_reference(actual, mean, tolerance=4 * torch.finfo(dtype).eps)


def test_every_nan_is_nan_whatever_its_lower_bits(isa: str) -> None:
    """They must not count as a power of two."""
    for bits in (-1, 0x7F800001, 0x7FC00001, -0x00400001):
        qkv = cases.qkv_of(2, 37, HEADS, 64, torch.float32)
        qkv.view(torch.int32)[0, 5, HEADS * 64 + 3] = bits  # of a key
        actual, expected = native.attention(qkv, HEADS), reference.attention(qkv, HEADS)
        assert expected[0, :, :64].isnan().all()
        assert torch.equal(actual.isnan(), expected.isnan()), hex(bits)


@ALL_DTYPES
def test_it_reads_and_writes_nothing_outside(isa: str, dtype: torch.dtype) -> None:
    t, d = 37, 72
    # A sum would show the NaN.
    memory = torch.full((t * 3 * HEADS * d + 128,), float("nan"), dtype=dtype)
    qkv = memory[64:-64].view(1, t, -1).copy_(cases.qkv_of(1, t, HEADS, d, dtype))
    around = torch.full((t * HEADS * d + 128,), 7, dtype=dtype)
    out = native.attention(qkv, HEADS, out=around[64:-64].view(1, t, -1))
    assert torch.equal(out, native.attention(qkv.clone(), HEADS)) and out.isfinite().all()
    assert (around[:64] == 7).all() and (around[-64:] == 7).all()
