"""The tilings of `dit_kernels.triton.product`, and which of them are worth a measurement.

A tile's sides are powers of two in Triton, so a tile of 192 columns has two accumulators, of 128
and 64 columns: 1152 = 6 · 192 and 3456 = 18 · 192 then waste nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from dit_kernels.triton.launch import split

DEPTH = 64  # of K, per step: 128 bytes, the widest that shared memory swizzles
SHARED_MEMORY = 232448  # bytes, of a block; a multiprocessor has 1 KB more for each block
SIDES = ((128, 128), (128, 144), (128, 192), (128, 256), (64, 128), (64, 144), (64, 192))
FEW_ROWS = 1024  # up to here, partial sums are small beside the weight


class ProductTiles(NamedTuple):
    """How a product is cut, and what the compiler is told of it."""

    rows: int
    columns: int  # a power of two, or the sum of two
    depth: int  # of K, per step of the loop
    num_warps: int
    num_stages: int
    splits: int = 1  # of K


def reached(rows: int, columns: int) -> float:
    """The share of the matrix rate at which shared memory can feed a tile's operands.

    Per 16 of K, 2048 multiplications take a cycle, and shared memory delivers 128 bytes in it. For
    each accumulator, every group of 64 rows reads its rows and the accumulator's columns; both are
    written once, when they arrive.
    """
    accumulators = 2 if split(columns)[1] else 1
    read = rows // 64 * 32 * (64 * accumulators + columns)
    return min(1.0, rows * columns / 128 / ((read + 32 * (rows + columns)) / 128))


def tiles_for(
    rows: int, columns: int, count: int, processors: int, splits: int = 1
) -> ProductTiles:
    """Tiles with as many stages as shared memory allows, if there are ``count`` · ``splits``.

    A multiprocessor holds two programs of 4 warps, of which one writes while the other multiplies;
    or one program with more stages, if there are no more tiles than multiprocessors.
    """
    alone = count * splits <= processors or columns == 256
    num_warps = 8 if alone and rows == 128 else 4
    # Through which the result leaves, a part of each accumulator at a time.
    part = 256 if num_warps == 8 else 128
    through = rows * (part + min(part, 4 * split(columns)[1]))
    memory = SHARED_MEMORY if alone else (SHARED_MEMORY - 1024) // 2
    stages = (memory - through - 512) // (2 * DEPTH * (rows + columns))
    return ProductTiles(rows, columns, DEPTH, num_warps, min(stages, 6), splits)


def candidates(rows: int, inputs: int, outputs: int, processors: int) -> dict[str, ProductTiles]:
    """Up to 6 tilings of a product (R, K) · (M, K)ᵀ that may be the quickest, by name.

    The work of the busiest multiprocessor, and the rate that `reached` gives, estimate each
    tiling's time. Those of up to 1.4 times the least are left, except where another one with as
    many warps is quicker and worse in neither. For few rows, whose tiles leave multiprocessors
    idle, also splits of K that occupy them; only `product_partial_sums` takes those.
    """
    counts, tiles, merits = {}, {}, {}
    for down, across in SIDES:
        sides = down, across
        counts[sides] = -(-rows // down) * -(-outputs // across)
        tiles[sides] = tiles_for(down, across, counts[sides], processors)
        work = -(-counts[sides] // processors) * down * across
        merits[sides] = -work, reached(down, across)
    times = {sides: -work / rate for sides, (work, rate) in merits.items()}

    def beaten(one: tuple[int, int]) -> bool:
        return any(
            merits[other][0] >= merits[one][0]
            and merits[other][1] >= merits[one][1]
            and times[other] < 0.95 * times[one]
            and tiles[other].num_warps == tiles[one].num_warps
            for other in SIDES
        )

    found = {}
    for sides in sorted(SIDES, key=times.__getitem__):
        if times[sides] <= 1.4 * min(times.values()) and not beaten(sides) and len(found) < 4:
            found[f"{sides[0]}x{sides[1]}"] = tiles[sides]
    if rows <= FEW_ROWS:
        for sides in ((128, 128), (128, 192)):
            # One tile per multiprocessor, or two where that would leave many of them idle.
            splits = processors // counts[sides]
            if splits < 2:
                splits = 2 * processors // counts[sides]
            splits = min(splits, 8, inputs // 256)
            if splits >= 2 and counts[sides] <= 0.6 * processors:
                name = f"{sides[0]}x{sides[1]} split {splits}"
                found[name] = tiles_for(*sides, counts[sides], processors, splits)
    return found
