"""The first layer: patches of the latents · weight + bias + positions, for both guidance halves."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.triton.launch import launch, power_of_two

# So narrow that loads and stores have the same layout, without an exchange through shared memory.
_ROWS, _COLUMNS = 32, 64
_UNROLLED = 16  # at most so many inputs; a patch of 2 × 2 latents with 4 channels has 16


@triton.jit
def _embed_kernel(
    z,  # (N, C, S, S) float32 contiguous
    weight,  # (C·P·P, D) float32 contiguous
    bias,  # (D,) float32
    positions,  # (T, D) float32 contiguous
    out,  # (HALVES·N, T, D) contiguous
    counter,  # int64, or None
    rows,  # N·T
    C: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    SIDE: tl.constexpr,  # patches along a side
    D: tl.constexpr,
    HALVES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,  # programs per row
    UNROLLED: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // BLOCKS) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (program % BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    valid, inside = row < rows, column < D
    image = row // (SIDE * SIDE)
    token = row - image * (SIDE * SIDE)
    first = z + image.to(tl.int64) * (C * S * S) + token // SIDE * (P * S) + token % SIDE * P
    total = tl.load(bias + column, mask=inside) + tl.load(
        positions + token * D + column, mask=valid & inside
    )
    for start in range(0, C * P * P, UNROLLED):
        for ahead in tl.static_range(UNROLLED):  # pyright: ignore[reportGeneralTypeIssues]
            k = start + ahead
            # Input k is channel k // P², row k // P % P and column k % P of the patch.
            offset = k // (P * P) * (S * S) + k // P % P * S + k % P
            x = tl.load(first + offset, mask=valid)
            total += x * tl.load(weight + k * D + column, mask=inside)
    out += row.to(tl.int64) * D + column
    tokens = total.to(out.dtype.element_ty)
    tl.store(out, tokens, mask=valid & inside)
    if HALVES == 2:
        tl.store(out + tl.cast(rows, tl.int64) * D, tokens, mask=valid & inside)
    if counter is not None:  # noqa: SIM102 - known when the kernel is compiled
        if program == 0:
            tl.store(counter, tl.load(counter) + 1)


def embed(
    z: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, patch_size: int,
    *, out: Tensor, counter: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Latents z (N, C, S, S) → tokens in ``out``, (N, T, D), or (2·N, T, D) with the tokens twice.

    z, weight (C·p·p, D), bias (D,) and positions (T, D) are float32, and sums are taken in float32.
    ``counter``, one int64 number on the device, is incremented.
    """
    n, channels, side, _ = z.shape
    d = len(bias)
    rows, inputs = n * len(positions), len(weight)
    columns = min(power_of_two(d), _COLUMNS)
    blocks = -(-d // columns)
    if rows:
        launch(
            _embed_kernel, -(-rows // _ROWS) * blocks,
            z, weight, bias, positions, out, counter, rows,
            C=channels, S=side, P=patch_size, SIDE=side // patch_size, D=d, HALVES=len(out) // n,
            ROWS=_ROWS, COLUMNS=columns, BLOCKS=blocks,
            UNROLLED=next(k for k in range(_UNROLLED, 0, -1) if inputs % k == 0), num_warps=4,
        )  # fmt: skip
    return out
