"""Our matrix product for Hopper: against float64 in Triton's interpreter, and its machine code."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import test_triton_resources as resources
import torch
import torch.nn.functional as F
from cases import random
from numerics import assert_close_to_reference
from test_triton_resources import PROCESSORS, SHARED_MEMORY
from torch import Tensor
from triton_workers import compilers, interpreted, require_triton

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


# The machine code


class Launch(NamedTuple):
    epilogue: str
    rows: int  # images of 256 tokens
    inputs: int
    outputs: int
    tiles: tuple[int, ...]
    dtype: torch.dtype


class Code(NamedTuple):
    shared_bytes: int
    scratch_bytes: int  # of device memory, which a captured launch must not need
    instructions: Counter[str]
    most_in_flight: int  # groups of matrix instructions that the loop does not wait for


def launches() -> list[Launch]:
    """Every candidate of the four products of a block, at few and at many rows, each once."""
    from dit_kernels.triton.product import candidates

    found = {}
    for width in (1152, 1024, 768, 384):
        for rows in (512, 16384) if width == 1152 else (512,):
            for name, k, m in (
                ("bias", 1, 3), ("gate", 1, 1), ("gelu", 1, 4), ("gate", 4, 1)
            ):  # fmt: skip
                k, m = k * width, m * width
                for tiles in candidates(rows, k, m, PROCESSORS).values():
                    epilogue = name if tiles.splits == 1 else "sums"
                    if epilogue != "sums" or name == "gate":
                        found[epilogue, tiles, rows] = Launch(
                            epilogue, rows, k, m, tuple(tiles), torch.bfloat16
                        )
    some = [launch for launch in found.values() if launch.inputs == 1152 and launch.rows == 16384]
    return [*found.values(), *(launch._replace(dtype=torch.float16) for launch in some[:3])]


def machine_code(launch: Launch) -> Code:
    from dit_kernels.triton import product as module

    empty = functools.partial(torch.empty, dtype=launch.dtype, device="meta")
    tiles, k, m = module.ProductTiles(*launch.tiles), launch.inputs, launch.outputs
    x, weight, bias = empty(launch.rows // 256, 256, k), empty(m, k), empty(m)
    gate = empty(len(x), 6 * m)[:, :m]
    made = []

    class Recorder:
        """Stands in for the kernel, and keeps the arguments of its launch."""

        kernel = module._product_kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            names = self.kernel.arg_names
            return lambda *given, **named: made.append(
                dict(zip(names, given, strict=False)) | named
            )

    with (
        patch.object(module, "_product_kernel", Recorder()),
        patch.object(module, "device_facts", return_value=(9, PROCESSORS)),
    ):
        if launch.epilogue == "sums":
            module.product_partial_sums(x, weight, tiles)
        elif launch.epilogue == "gate":
            residual = empty(len(x), 256, m)
            module.product_gate_residual(x, weight, bias, gate, residual, tiles)
        else:
            module.product(x, weight, bias, tiles, gelu=launch.epilogue == "gelu")
    compiled = resources._compile(Recorder.kernel, made[0], 90)
    code = resources._disassemble(compiled)
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)", code, re.MULTILINE)
    waits = map(int, re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", code))
    metadata = compiled.metadata
    return Code(metadata.shared, metadata.global_scratch_size, Counter(opcodes), max(waits))


@pytest.mark.slow
def test_machine_code_of_every_candidate() -> None:
    require_triton()
    from dit_kernels.triton.product import ProductTiles

    chosen = launches()
    for launch, code in zip(chosen, compilers().map(machine_code, chosen), strict=True):
        seen, tiles = code.instructions, ProductTiles(*launch.tiles)
        assert seen["LDL"] == seen["STL"] == 0, launch
        assert code.shared_bytes <= SHARED_MEMORY[90] and code.scratch_bytes == 0, launch
        if tiles.num_warps == 4 and tiles.num_stages < 6:  # two programs per multiprocessor
            assert code.shared_bytes + 1024 <= (SHARED_MEMORY[90] + 1024) // 2, launch
        # Operands and results go through the copy engine: nothing else is stored.
        assert seen["UTMALDG"] and seen["UTMASTG"] and not seen["STG"], launch
        # 16 of K per instruction, of up to 64 rows per group of 4 warps and 256 columns. If ptxas
        # made each wait for the one before, none would be in flight.
        accumulators = 1 if tiles.columns != 192 else 2
        groups = tiles.rows // 64 // (tiles.num_warps // 4)
        assert seen["HGMMA"] == groups * accumulators * tiles.depth // 16, launch
        assert code.most_in_flight == accumulators and not seen["HMMA"], launch
