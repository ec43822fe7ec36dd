"""The tilings of `dit_kernels.triton.product`, and which of them are worth measuring.

The sides of a tile are powers of two in Triton. A tile of 192 columns therefore has two
accumulators, of 128 and 64 columns. 1152 = 6 · 192 and 3456 = 18 · 192 columns waste nothing then.
"""

from __future__ import annotations

from typing import NamedTuple

from dit_kernels.triton.launch import split

DEPTH = 64  # inputs per step of the loop: 128 bytes, the widest swizzle of shared memory
SHARED_MEMORY = 232448  # bytes per block; a multiprocessor has 1 KB more for each block
SIDES = ((128, 128), (128, 144), (128, 192), (128, 256), (64, 128), (64, 144), (64, 192))
FEW_ROWS = 1024  # up to this number of rows, partial sums have few bytes beside the weight


class ProductTiles(NamedTuple):
    """The tile sizes and splits of a product, and options of Triton's compiler."""

    rows: int
    columns: int  # a power of two, or the sum of two
    depth: int  # inputs per step of the loop
    num_warps: int
    num_stages: int
    splits: int = 1  # number of parts of K


def feed_rate(rows: int, columns: int) -> float:
    """The share of the rate of the tensor cores at which shared memory can feed a tile (at most 1).

    For 16 inputs, the tile takes ``rows`` · ``columns`` / 128 cycles. Shared memory moves 128 bytes
    per cycle. For each accumulator, every group of 64 rows reads its own rows of x and the columns
    of the accumulator. Both operands are also written once, when they arrive.
    """
    accumulators = 2 if split(columns)[1] else 1
    read = rows // 64 * 32 * (64 * accumulators + columns)
    return min(1.0, rows * columns / 128 / ((read + 32 * (rows + columns)) / 128))


def tiles_for(
    rows: int, columns: int, count: int, processors: int, splits: int = 1
) -> ProductTiles:
    """Tiles with as many stages as fit into shared memory, but at most 6.

    A multiprocessor holds two programs, of which one writes while the other multiplies. It holds
    one program, with more stages, if there are no more tiles (``count`` · ``splits``) than
    multiprocessors (``processors``), or if a tile has 256 columns.
    """
    alone = count * splits <= processors or columns == 256
    num_warps = 8 if alone and rows == 128 else 4
    # Bytes of shared memory through which the result is written, a part of an accumulator at once.
    part = 256 if num_warps == 8 else 128
    through = rows * (part + min(part, 4 * split(columns)[1]))
    memory = SHARED_MEMORY if alone else (SHARED_MEMORY - 1024) // 2
    stages = (memory - through - 512) // (2 * DEPTH * (rows + columns))
    return ProductTiles(rows, columns, DEPTH, num_warps, min(stages, 6), splits)


def candidates(rows: int, inputs: int, outputs: int, processors: int) -> dict[str, ProductTiles]:
    """Name → up to 6 tilings of a product (R, K) · (M, K)ᵀ that are worth measuring.

    A tiling's time is estimated from the work of the busiest multiprocessor and the rate that
    `feed_rate` gives. At most four tilings are kept, all within 1.4 times the shortest time. One is
    left out if another with as many warps takes less than 0.95 of its time and is not worse in work
    or in rate. For few rows, whose tiles leave multiprocessors idle, up to two tilings that split K
    are added; they are only for `product_partial_sums`.
    """
    counts, tiles, merits = {}, {}, {}
    for down, across in SIDES:
        sides = down, across
        counts[sides] = -(-rows // down) * -(-outputs // across)
        tiles[sides] = tiles_for(down, across, counts[sides], processors)
        work = -(-counts[sides] // processors) * down * across
        merits[sides] = -work, feed_rate(down, across)
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
            # One tile per multiprocessor, or two if one would allow no split.
            splits = processors // counts[sides]
            if splits < 2:
                splits = 2 * processors // counts[sides]
            splits = min(splits, 8, inputs // 256)
            if splits >= 2 and counts[sides] <= 0.6 * processors:
                name = f"{sides[0]}x{sides[1]} split {splits}"
                found[name] = tiles_for(*sides, counts[sides], processors, splits)
    return found
