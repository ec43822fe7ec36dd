"""Our matrix product for Hopper: against float64 in Triton's interpreter, and its machine code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from cases import random
from numerics import assert_close_to_reference
from torch import Tensor
from triton_workers import interpreted

from dit_kernels import reference

MODULE = "dit_kernels.triton.product"


class Shape(NamedTuple):
    n: int
    t: int
    k: int
    m: int
    tiles: tuple[int, ...]  # rows, columns, depth, warps, stages
    reason: str


SHAPES = (
    Shape(2, 64, 128, 192, (64, 192, 64, 4, 2), "whole tiles of two accumulators, an image each"),
    Shape(3, 50, 72, 200, (128, 192, 64, 4, 2), "ragged in every direction, images inside tiles"),
    Shape(1, 5, 8, 8, (64, 128, 64, 4, 3), "less than a tile in every direction"),
    Shape(1, 160, 200, 264, (128, 128, 64, 8, 4), "fused loops with several tiles per program"),
    Shape(2, 64, 64, 136, (128, 256, 64, 8, 4), "columns that reach past the end by half a tile"),
)
IN_HALF = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:]
)


def operands(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, weight, bias, gate (rows at a stride) and residual."""
    n, t, k, m, *_ = shape
    x, weight = random(n, t, k, dtype=dtype), random(m, k, dtype=dtype, seed=1) / k**0.5
    bias, residual = random(m, dtype=dtype, seed=2), random(n, t, m, dtype=dtype, seed=3)
    return x, weight, bias, random(n, 3 * m, dtype=dtype, seed=4)[:, m : 2 * m], residual


def compared(shape: Shape, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Epilogue, our result, float64's, and the reference's in the operands' dtype."""
    from dit_kernels.triton import product as module

    tiles = module.ProductTiles(*shape.tiles)
    x, weight, bias, gate, residual = given = operands(shape, dtype)
    wide = [v.double() for v in given]
    for gelu, name in ((False, "linear"), (True, "linear_gelu")):
        ours = module.product(x, weight, bias, tiles, gelu=gelu)
        run = getattr(reference, name)
        yield name, ours, run(*wide[:3]), run(*given[:3])
    exact = reference.gate_residual(wide[4], reference.linear(*wide[:3]), wide[3])
    same = reference.gate_residual(residual, reference.linear(x, weight, bias), gate)
    ours = module.product_gate_residual(x, weight, bias, gate, residual, tiles)
    assert ours is residual
    yield "gate_residual", ours, exact, same


@IN_HALF
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.reason)
@interpreted
def test_every_epilogue(shape: Shape, dtype: torch.dtype) -> None:
    with patch(f"{MODULE}.device_facts", return_value=(9, 1)):
        for name, ours, exact, same in compared(shape, dtype):
            assert ours.dtype == dtype and ours.shape == same.shape, name
            assert_close_to_reference(ours, exact, same_dtype=same)


@pytest.mark.parametrize("splits", [1, 2, 3])
@interpreted
def test_partial_sums(splits: int) -> None:
    from dit_kernels.triton.product import ProductTiles, product_partial_sums

    for n, t, k, m in ((2, 50, 320, 200), (1, 3, 72, 8)):  # the second has splits without a step
        tiles = ProductTiles(64, 192, 64, 4, 2, splits)
        x, weight, bias = operands(Shape(n, t, k, m, (), ""), torch.bfloat16)[:3]
        sums = product_partial_sums(x, weight, tiles)
        assert sums.shape == (splits, n, t, m) and sums.dtype == torch.float32
        whole = F.linear(x.double(), weight.double(), bias.double())
        same = F.linear(x.float(), weight.float(), bias.float())
        assert_close_to_reference(sums.sum(0) + bias.float(), whole, same_dtype=same)


def test_what_is_refused() -> None:
    from dit_kernels.checks import Unavailable
    from dit_kernels.triton.product import ProductTiles, product, why_not

    half, brain = torch.float16, torch.bfloat16
    x, weight = torch.zeros(4, 72, dtype=brain), torch.zeros(8, 72, dtype=brain)
    assert why_not(x, weight) is None
    for a, b, reason in (
        (x.float(), weight.float(), "dtypes torch.float32 and torch.float32: both bfloat16 or"),
        (x.to(half), weight, "dtypes torch.float16 and torch.bfloat16: both"),
        (x[:, ::2], weight[:, :36], r"x of strides \(72, 2\): multiples of 8 and then 1"),
        (x[:, :68].contiguous(), weight[:, :68], r"x of strides \(68, 1\)"),
        (x, weight.t().contiguous().t(), r"weight of strides \(1, 8\)"),
        (x[:, 1:65], weight[:, :64], "x does not start at a multiple of 16 bytes"),
        (x, weight[:7], "7 outputs: a multiple of 8"),
    ):
        with pytest.raises(Unavailable, match=f"^product: {reason}"):
            product(a, b, torch.zeros(len(b), dtype=brain), ProductTiles(64, 128, 64, 4, 2))


def test_candidates_fill_the_processors() -> None:
    from dit_kernels.triton.product import candidates

    for width in (384, 768, 1024, 1152):
        for inputs, outputs in ((1, 3), (1, 1), (1, 4), (4, 1)):
            for rows in (32, 256, 512, 1024, 2048, 16384):
                found = candidates(rows, inputs * width, outputs * width, 132)
                assert 1 <= len(found) <= 6
                assert rows <= 1024 or all(tiles.splits == 1 for tiles in found.values())
                assert next(iter(found.values())).splits == 1
    assert "128x128" in candidates(512, 1152, 3456, 132)  # 108 tiles at once
    assert "128x128 split 3" in candidates(512, 4608, 1152, 132)  # 3 · 36 tiles
    many = candidates(16384, 1152, 4608, 132)
    assert {"128x256", "128x192", "128x128"} <= set(many)
