"""Our matrix product for Hopper: its error against float64, and its machine code."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import test_triton_resources as resources
import torch
from cases import moved, random
from numerics import assert_close_to_reference, exact_float32
from test_triton_resources import PROCESSORS, SHARED_MEMORY
from torch import Tensor
from triton_workers import compilers, interpreted, require_triton

from dit_kernels import reference

MODULE = "dit_kernels.triton.product"
HALF, BRAIN = torch.float16, torch.bfloat16


class Case(NamedTuple):
    """(N, T, K) · (M, K)ᵀ in tiles of rows, columns, depth, warps, stages and splits."""

    n: int
    t: int
    k: int
    m: int
    tiles: tuple[int, ...]
    reason: str = ""


CASES = (
    Case(2, 64, 128, 192, (64, 192, 64, 4, 2), "whole tiles of two accumulators, an image each"),
    Case(3, 50, 72, 200, (128, 192, 64, 4, 2), "ragged in every direction, images inside tiles"),
    Case(1, 130, 64, 152, (128, 144, 64, 8, 4), "a second accumulator of 16 columns"),
    Case(1, 5, 8, 8, (64, 128, 64, 4, 3), "less than a tile in every direction"),
    Case(1, 160, 200, 264, (128, 128, 64, 8, 4), "fused loops with several tiles per program"),
    Case(2, 64, 64, 136, (128, 256, 64, 8, 4), "columns that reach past the end by half a tile"),
)
PARTS = (
    *(Case(2, 50, 320, 200, (64, 192, 64, 4, 2, splits), "") for splits in (1, 2, 3)),
    Case(1, 3, 72, 8, (64, 128, 64, 4, 2, 4), "splits without a step"),
)


def operands(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """x (N, T, K), weight (M, K), bias (M,), gate (N, M) with strided rows, residual (N, T, M)."""
    n, t, k, m, *_ = case
    x, weight = random(n, t, k, dtype=dtype), random(m, k, dtype=dtype, seed=1) / k**0.5
    bias, residual = random(m, dtype=dtype, seed=2), random(n, t, m, dtype=dtype, seed=3)
    return [x, weight, bias, random(n, 3 * m, dtype=dtype, seed=4)[:, m : 2 * m], residual]


def run(epilogue: str, tiles: tuple[int, ...], given: Sequence[Tensor]) -> Tensor:
    """Our product with one of its epilogues; the residual is overwritten."""
    from dit_kernels.triton import product as module

    x, weight, bias, gate, residual = given
    cut = module.ProductTiles(*tiles)
    if epilogue == "sums":
        return module.product_partial_sums(x, weight, cut)
    if epilogue == "gate":
        return module.product_gate_residual(x, weight, bias, gate, residual, cut)
    return module.product(x, weight, bias, cut, gelu=epilogue == "gelu")


def definition(epilogue: str, given: Sequence[Tensor]) -> Tensor:
    """The reference, in the operands' dtype."""
    x, weight, bias, gate, residual = given
    if epilogue == "gate":
        return reference.gate_residual(residual, reference.linear(x, weight, bias), gate)
    linear = reference.linear_gelu if epilogue == "gelu" else reference.linear
    return linear(x, weight, bias)


def check(epilogue: str, tiles: tuple[int, ...], given: Sequence[Tensor]) -> None:
    """The error against float64 is at most twice that of the reference; partial sums are compared
    with a float32 product."""
    exact = definition(epilogue, [v.double() for v in given])
    same = definition(epilogue, [v.float() for v in given] if epilogue == "sums" else given)
    ours = run(epilogue, tiles, [*given[:4], given[4].clone()])
    if epilogue == "sums":
        assert len(ours) == tiles[5]
        ours = ours.sum(0) + given[2].float()
    assert ours.dtype == same.dtype and ours.shape == same.shape
    if epilogue == "sums" and ours.is_cuda:  # matrix units add up less exactly than float32 does
        assert_close_to_reference(ours, exact, tolerance=1e-4)
    else:
        assert_close_to_reference(ours, exact, same_dtype=same)


@pytest.mark.parametrize("dtype", [BRAIN, HALF], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("epilogue", ["bias", "gelu", "gate", "sums"])
@interpreted
def test_every_epilogue(epilogue: str, dtype: torch.dtype) -> None:
    with patch(f"{MODULE}.device_facts", return_value=(9, 1)):  # every program has several tiles
        for case in PARTS if epilogue == "sums" else CASES:
            check(epilogue, case.tiles, operands(case, dtype))


@interpreted
def test_the_residual_and_the_result_are_written_in_place() -> None:
    from dit_kernels.triton import product as module

    case = CASES[1]
    x, weight, bias, gate, residual = operands(case, BRAIN)
    tiles = module.ProductTiles(*case.tiles)
    out = torch.full_like(residual, torch.nan)
    assert module.product(x, weight, bias, tiles, out=out) is out
    assert torch.equal(out, module.product(x, weight, bias, tiles))
    assert torch.equal(out[0, 0], module.product(x[0, 0], weight, bias, tiles))
    result = module.product_gate_residual(x, weight, bias, gate, residual, tiles)
    assert result is residual
    assert module.product(x[:0], weight, bias, tiles).shape == (0, case.t, case.m)


def test_what_is_refused() -> None:
    from dit_kernels.checks import Unavailable
    from dit_kernels.triton.product import ProductTiles, product, why_not

    x, weight = torch.zeros(4, 72, dtype=BRAIN), torch.zeros(8, 72, dtype=BRAIN)
    assert why_not(x, weight) is None
    for a, b, reason in (
        (x.float(), weight.float(), "dtypes torch.float32 and torch.float32: both bfloat16 or"),
        (x.to(HALF), weight, "dtypes torch.float16 and torch.bfloat16: both"),
        (x[:, ::2], weight[:, :36], r"x of strides \(72, 2\): multiples of 8 and then 1"),
        (x[:, :68].contiguous(), weight[:, :68], r"x of strides \(68, 1\)"),
        (x, weight.t().contiguous().t(), r"weight of strides \(1, 8\)"),
        (x[:, 1:65], weight[:, :64], "x does not start at a multiple of 16 bytes"),
        (x, weight[:7], "7 outputs: a multiple of 8"),
    ):
        with pytest.raises(Unavailable, match=f"^product: {reason}"):
            product(a, b, torch.zeros(len(b), dtype=BRAIN), ProductTiles(64, 128, 64, 4, 2))
    tiles, out = ProductTiles(64, 128, 64, 4, 2), torch.zeros(33, dtype=BRAIN)[1:].view(4, 8)
    with pytest.raises(Unavailable, match=r"^product: the result does not start at a multiple"):
        product(x, weight, torch.zeros(8, dtype=BRAIN), tiles, out=out)
    with patch("torch.cuda.get_device_capability", return_value=(12, 0)):
        on_gpu = torch.empty(4, 72, dtype=BRAIN, device="meta")
        with patch.object(Tensor, "is_cuda", True):
            assert (
                why_not(on_gpu, weight) == "compute capability 12.0: only 9.0 (Hopper) is supported"
            )


def test_candidates_fill_the_processors() -> None:
    from dit_kernels.triton.product import candidates

    for width in (384, 768, 1024, 1152):
        for inputs, outputs in ((1, 3), (1, 1), (1, 4), (4, 1)):
            for rows in (32, 256, 512, 1024, 2048, 16384):
                found = candidates(rows, inputs * width, outputs * width, PROCESSORS)
                assert 1 <= len(found) <= 6 and next(iter(found.values())).splits == 1
                assert rows <= 1024 or all(tiles.splits == 1 for tiles in found.values())
    # 108 tiles at once, 3 · 36, and 128 with 1.1 times the work of the average processor.
    assert "128x128" in candidates(512, 1152, 3456, PROCESSORS)
    assert "128x128 split 3" in candidates(512, 4608, 1152, PROCESSORS)
    assert next(iter(candidates(512, 1152, 4608, PROCESSORS))) == "128x144"
    for inputs, outputs in ((1152, 3456), (1152, 1152), (1152, 4608), (4608, 1152)):
        assert {"128x256", "128x192"} <= set(candidates(16384, inputs, outputs, PROCESSORS))


# The machine code


class Launch(NamedTuple):
    epilogue: str
    case: Case
    dtype: torch.dtype


class Code(NamedTuple):
    shared_bytes: int
    scratch_bytes: int  # of device memory, which a captured launch must not need
    instructions: Counter[str]
    most_in_flight: int  # groups of matrix instructions that the loop does not wait for


def launches(widths: Sequence[int] = (1152, 1024, 768, 384)) -> list[Launch]:
    """The candidates of a block's four products for 2 rows of 256 tokens, and XL's also for 64."""
    from dit_kernels.triton.product import candidates

    found = {}
    for n, width in [(64, widths[0]), *((2, width) for width in widths)]:
        for name, k, m in (("bias", 1, 3), ("gate", 1, 1), ("gelu", 1, 4), ("gate", 4, 1)):
            k, m = k * width, m * width
            for tiles in candidates(n * 256, k, m, PROCESSORS).values():
                epilogue = name if tiles.splits == 1 else "sums"
                if epilogue != "sums" or name == "gate":
                    case = Case(n, 256, k, m, tiles)
                    found[epilogue, tiles, n] = Launch(epilogue, case, BRAIN)
    some = [launch._replace(dtype=HALF) for launch in found.values() if launch.case.n == 64]
    return [*found.values(), *some[:3]]


def machine_code(launch: Launch) -> Code:
    from dit_kernels.triton import product as module

    n, t, k, m, tiles, _ = launch.case
    empty = functools.partial(torch.empty, dtype=launch.dtype, device="meta")
    given = [empty(n, t, k), empty(m, k), empty(m), empty(n, 6 * m)[:, :m], empty(n, t, m)]
    kernel, made = module._product_kernel, []

    class Recorder:
        """Stands in for the kernel and records the arguments of its launch."""

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def keep(*arguments: Any, **named: Any) -> None:
                made.append(dict(zip(kernel.arg_names, arguments, strict=False)) | named)

            return keep

    with (
        patch.object(module, "_product_kernel", Recorder()),
        patch.object(module, "device_facts", return_value=(9, PROCESSORS)),
    ):
        run(launch.epilogue, tiles, given)
    compiled = resources._compile(kernel, made[0], 90)
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
        seen, tiles = code.instructions, ProductTiles(*launch.case.tiles)
        assert seen["LDL"] == seen["STL"] == 0, launch
        assert code.shared_bytes <= SHARED_MEMORY[90] and code.scratch_bytes == 0, launch
        if tiles.num_warps == 4 and tiles.num_stages < 6:  # two programs per multiprocessor
            assert code.shared_bytes + 1024 <= (SHARED_MEMORY[90] + 1024) // 2, launch
        # Operands and results go through the copy engine: nothing else is stored.
        assert seen["UTMALDG"] and seen["UTMASTG"] and not seen["STG"], launch
        # An instruction takes 16 of K, 64 rows per group of 4 warps and up to 256 columns. None
        # would be in flight if ptxas made each wait for the one before.
        accumulators = 1 if tiles.columns in (128, 256) else 2
        groups = tiles.rows // 64 // (tiles.num_warps // 4)
        assert seen["HGMMA"] == groups * accumulators * tiles.depth // 16, launch
        assert code.most_in_flight == accumulators and not seen["HMMA"], launch


# On a GPU: XL's products, ragged ones, and inside a CUDA graph


@pytest.mark.gpu
def test_every_candidate_on_a_gpu() -> None:
    from dit_kernels.triton.product import why_not

    if (reason := why_not(*(torch.empty(8, 8, dtype=BRAIN, device="cuda"),) * 2)) is not None:
        pytest.skip(reason)
    with exact_float32():
        for epilogue, case, dtype in launches((1152,)):
            check(epilogue, case.tiles, moved(operands(case, dtype), "cuda"))
        for case in CASES:
            check("gate", case.tiles, moved(operands(case, BRAIN), "cuda"))


@pytest.mark.gpu
def test_capture_in_a_graph() -> None:
    from dit_kernels.triton.product import why_not

    case = Case(2, 256, 1152, 1152, (128, 128, 64, 4, 3))
    given = moved(operands(case, BRAIN), "cuda")
    if (reason := why_not(*given[:2])) is not None:
        pytest.skip(reason)

    def both() -> Tensor:
        hidden = run("bias", case.tiles, given)
        return run("gate", case.tiles, [hidden, *given[1:4], given[4].clone()])

    both()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    given[0].copy_(given[0].flip(1))
    expected = both()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)
