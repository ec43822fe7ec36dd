"""The native linear layers with packed weights against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import random
from native_levels import LEVELS, needs_library, one_off, threads
from numerics import assert_close_to_reference
from torch import Tensor

from dit_kernels.cpu import product
from dit_kernels.cpu.recording import call

__all__ = ["threads"]  # a fixture
pytestmark = [
    needs_library,
    pytest.mark.skipif("avx512_bf16" not in LEVELS, reason="needs AVX512-BF16"),
]
HALF_AND_FULL = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
SHAPES = [  # rows, inputs, outputs
    (256, 384, 1152),  # whole blocks of 8 rows and panels of 48 outputs: S's qkv
    (128, 256, 256),  # a last panel of one vector
    (37, 77, 50),  # a rest of everything: rows, inputs of a bfloat16 step, outputs of a vector
    (15, 130, 1),  # a single output
    (23, 2307, 97),  # several sums of sums, and a rest; one output behind two panels
    (1, 4608, 100),  # a single row: XL's second MLP layer
    (300, 1201, 17),  # more rows than one piece
    (0, 64, 32),  # no rows
]


def layer(rows: int, k: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    weight = (random(m, k, seed=1) * k**-0.5).to(dtype)
    return random(rows, k, dtype=dtype), weight, random(m, dtype=dtype, seed=2)


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, m: int, gelu: bool = False) -> Tensor:
    k = x.shape[-1]
    memory = torch.full((len(x) * m + 1,), 7, dtype=x.dtype)
    call("dit_linear", x, packed, bias, memory, len(x), k, m, x.dtype, gelu)
    assert memory[-1] == 7  # nothing is written behind the last row
    return memory[:-1].view(len(x), m)


@pytest.mark.parametrize("gelu", [False, True])
@HALF_AND_FULL
def test_linear(dtype: torch.dtype, gelu: bool) -> None:
    for rows, k, m in SHAPES:
        x, weight, bias = layer(rows, k, m, dtype)
        exact = F.linear(x.double(), weight.double(), bias.double())
        same = F.linear(x, weight, bias)
        if gelu:
            exact, same = (F.gelu(v, approximate="tanh") for v in (exact, same))
        actual = linear(x, product.pack(weight), bias.float(), m, gelu)
        if rows:
            assert_close_to_reference(actual, exact, same_dtype=same)


@HALF_AND_FULL
def test_every_small_size_without_a_bias(dtype: torch.dtype) -> None:
    for rows in (1, 2, 9):  # 9: a block and a row
        for k in range(1, 10):  # each rest of a step of 1, 2 or 4 bytes
            for m in (1, 15, 16, 33, 49):  # around a vector, and around a panel
                x, weight, _ = layer(rows, k, m, dtype)
                actual = linear(x, product.pack(weight), None, m)
                exact = F.linear(x.double(), weight.double())
                assert_close_to_reference(actual, exact, tolerance=4 * torch.finfo(dtype).eps)


@HALF_AND_FULL
@pytest.mark.parametrize(("k", "m"), [(1152, 384), (2307, 97), (16, 2000)])
def test_a_row_depends_on_nothing_beside_it(
    k: int, m: int, dtype: torch.dtype, threads: None
) -> None:
    x, weight, bias = layer(67, k, m, dtype)
    torch.set_num_threads(1)
    packed, wide = product.pack(weight), bias.float()
    whole = linear(x, packed, wide, m, gelu=True)
    for count in (2, 5):
        torch.set_num_threads(count)
        assert torch.equal(packed, product.pack(weight))
        for rows in (0, 1, 2, 3, 5, 8, 64):
            assert torch.equal(linear(x[:rows], packed, wide, m, True), whole[:rows]), rows
            assert torch.equal(linear(x[rows:], packed, wide, m, True), whole[rows:]), rows


@HALF_AND_FULL
@pytest.mark.parametrize("k", [33, 34])  # bfloat16 rows that end within a step, and that do not
def test_nan_and_infinity_stay_in_their_row_which_may_lie_anywhere(
    k: int, dtype: torch.dtype
) -> None:
    x, weight, bias = layer(11, k, 50, dtype)
    packed = product.pack(weight)
    clean = linear(x, packed, bias.float(), 50)
    assert torch.equal(linear(one_off(x), packed, bias.float(), 50), clean)
    x[5, 0], x[9, 0] = torch.nan, torch.inf
    actual = linear(x, packed, bias.float(), 50)
    assert actual[5].isnan().all() and actual[9].isinf().all()
    others = [row for row in range(11) if row not in (5, 9)]
    assert torch.equal(actual[others], clean[others])


@pytest.mark.parametrize("gelu", [False, True])
@HALF_AND_FULL
def test_linear_int8(dtype: torch.dtype, gelu: bool, threads: None) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, k, m in SHAPES[:-1]:
        codes = torch.randint(1, 256, (rows, k), generator=generator, dtype=torch.uint8)
        weight = torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8)
        scales = torch.rand(rows, generator=generator) / 127
        weight_scales = torch.rand(m, generator=generator) / (127 * k**0.5)
        bias = torch.randn(m, generator=generator)
        whole = (codes.double() - 128) @ weight.double().T
        exact = whole * scales[:, None].double() * weight_scales.double() + bias.double()
        exact = F.gelu(exact, approximate="tanh") if gelu else exact
        arguments = (codes, scales, product.pack(weight), weight_scales, bias, dtype, gelu)
        torch.set_num_threads(1)
        actual = product.linear_int8(*arguments)
        assert_close_to_reference(actual, exact, tolerance=4 * torch.finfo(dtype).eps)
        torch.set_num_threads(3)
        assert torch.equal(product.linear_int8(*arguments), actual)


def test_int8_at_the_ends_of_its_range() -> None:
    k, one, zero = 65536, torch.ones(1), torch.zeros(1)
    for code, weight in ((255, 127), (255, -128), (0, -128), (0, 127)):
        codes = torch.full((1, k), code, dtype=torch.uint8)
        packed = product.pack(torch.full((1, k), weight, dtype=torch.int8))
        actual = product.linear_int8(codes, one, packed, one, zero, torch.float32, False)
        assert actual.item() == (code - 128) * weight * k
