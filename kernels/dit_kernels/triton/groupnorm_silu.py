"""SiLU(GroupNorm(x)) in channels-last memory, in two launches: partial moments, then the result.

A program computes a chunk of an image's pixels in whole groups, about 32 or 64 channels wide. Each
program of the second launch combines the partial moments of its groups. The second launch reads x
from the end, because the first reads from the start and the cache holds what was read last. There
are no atomics, and an image is always cut in the same way for its shape, so results repeat exactly
and do not depend on the rest of the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.triton.launch import launch, power_of_two

_PROGRAMS = 256  # at most, per image: about two for each of an H100's 132 multiprocessors
_NUM_WARPS = 8
_ROWS = 4  # at most so many accesses of 16 bytes per thread at a time


@triton.jit
def _channels(part, GROUPS: tl.constexpr, SIZE: tl.constexpr, PART: tl.constexpr):
    """The channels of the groups part·PART to (part + 1)·PART, and which of them exist."""
    PADDED: tl.constexpr = triton.next_power_of_2(SIZE)
    lane = tl.arange(0, PART * PADDED)
    if PADDED == SIZE:
        channel = part * (PART * SIZE) + lane
        return channel, channel < GROUPS * SIZE
    group, member = part * PART + lane // PADDED, lane % PADDED
    return group * SIZE + member, (group < GROUPS) & (member < SIZE)


@triton.jit
def _tile(
    first, end, channel, exists, C: tl.constexpr, ROWS: tl.constexpr, PIXELS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Offsets (ROWS, PIXELS, channels) of the pixels from ``first`` on, and which of them exist.

    In each of the ROWS a thread has 16 bytes of one pixel. EVEN: every tile that starts before
    ``end`` is full.
    """
    pixel = first + tl.arange(0, ROWS)[:, None] * PIXELS + tl.arange(0, PIXELS)[None, :]
    offsets = pixel[:, :, None] * C + channel[None, None, :]
    if EVEN:
        return offsets, tl.broadcast_to(first < end, offsets.shape)
    return offsets, (pixel < end)[:, :, None] & exists[None, None, :]


@triton.jit
def _rows_until(count, PIXELS: tl.constexpr):
    """For each i < PIXELS: how many of the pixels i, i + PIXELS, … are below ``count``."""
    left = count - tl.arange(0, PIXELS)
    return tl.maximum((left + PIXELS - 1) // PIXELS, 0).to(tl.float32)


@triton.jit
def _partial_moments_kernel(
    x,  # (N, H·W, C)
    y,  # None, or (N, H·W, C): added to x in place
    shift,  # None, or (C,): added to what is normalised, but not to x
    means,  # (N, GROUPS, chunks) float32
    squares,  # (N, GROUPS, chunks) float32: sums of squared distances from the mean
    pixels,  # H·W
    chunks,
    tiles,  # of ROWS·PIXELS pixels, in a chunk
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,  # channels per group
    PART: tl.constexpr,  # groups per program
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    EVEN: tl.constexpr,
):
    PARTS: tl.constexpr = (GROUPS + PART - 1) // PART
    C: tl.constexpr = GROUPS * SIZE
    PADDED: tl.constexpr = triton.next_power_of_2(SIZE)
    program = tl.program_id(0)
    part, chunk, image = program % PARTS, program // PARTS % chunks, program // PARTS // chunks
    x += image.to(tl.int64) * pixels * C
    if y is not None:
        y += image.to(tl.int64) * pixels * C
    channels = _channels(part, GROUPS, SIZE, PART)
    channel, exists = channels  # pyright: ignore[reportGeneralTypeIssues]
    start = chunk * tiles * (ROWS * PIXELS)
    end = tl.minimum(start + tiles * (ROWS * PIXELS), pixels)

    # Moments of each thread's own pixels and channels: threads exchange nothing in the loop.
    mean = tl.zeros((PIXELS, PART * PADDED), tl.float32)
    square = tl.zeros((PIXELS, PART * PADDED), tl.float32)
    offsets, mask = _tile(start, end, channel, exists, C, ROWS, PIXELS, EVEN)
    coming = tl.load(x + offsets, mask=mask, other=0.0)
    if y is not None:
        coming_y = tl.load(y + offsets, mask=mask, other=0.0)
    for tile in range(tiles):
        first = start + tile * (ROWS * PIXELS)
        values = coming
        if y is not None:
            values = (values.to(tl.float32) + coming_y.to(tl.float32)).to(x.dtype.element_ty)
        # The next tile is loaded while this one is computed.
        offsets, mask = _tile(first + ROWS * PIXELS, end, channel, exists, C, ROWS, PIXELS, EVEN)
        coming = tl.load(x + offsets, mask=mask, other=0.0)
        if y is not None:
            coming_y = tl.load(y + offsets, mask=mask, other=0.0)
        offsets, mask = _tile(first, end, channel, exists, C, ROWS, PIXELS, EVEN)
        if y is not None:
            tl.store(x + offsets, values, mask=mask)
        values = values.to(tl.float32)
        if EVEN:
            here = tl.full((PIXELS,), ROWS, tl.float32)
        else:
            here = tl.minimum(_rows_until(end - first, PIXELS), ROWS * 1.0)
        tile_mean = tl.sum(values, 0) * (1 / tl.maximum(here, 1.0))[:, None]
        centered = values - tile_mean[None, :, :]
        if not EVEN:
            centered = tl.where(mask, centered, 0.0)
        # Chan, Golub & LeVeque 1979: moments of a union from those of its parts.
        count = tile * (ROWS * 1.0)  # if this tile has a row, all tiles before it are full
        distance = tile_mean - mean
        share = here / tl.maximum(count + here, 1.0)
        mean += distance * share[:, None]
        square += tl.sum(centered * centered, 0) + distance * distance * (count * share)[:, None]

    if shift is not None:
        mean += tl.load(shift + channel, mask=exists, other=0.0)[None, :]
    elements = tl.maximum(end - start, 1) * (SIZE * 1.0)
    count = _rows_until(end - start, PIXELS)
    SPLIT: tl.constexpr = (PIXELS, PART, PADDED)
    whole = tl.sum(tl.sum(tl.reshape(mean * count[:, None], SPLIT), 2), 0) / elements  # (PART,)
    distance = tl.reshape(mean, SPLIT) - whole[None, :, None]
    distance = tl.where(tl.reshape(exists, (PART, PADDED))[None, :, :], distance, 0.0)
    square = tl.reshape(square, SPLIT) + distance * distance * count[:, None, None]
    square = tl.sum(tl.sum(square, 2), 0)
    group = part * PART + tl.arange(0, PART)
    place = (image.to(tl.int64) * GROUPS + group) * chunks + chunk
    tl.store(means + place, whole, mask=group < GROUPS)
    tl.store(squares + place, square, mask=group < GROUPS)


@triton.jit
def _sigmoid(values, EXACT: tl.constexpr, COMPILED: tl.constexpr):
    """1 / (1 + exp(−values)), with two instructions of the special function unit per number."""
    exponent = values * -1.4426950408889634
    if EXACT:
        exponent = tl.minimum(exponent, 126.0)  # the Newton step below needs finite numbers
    denominator = 1 + tl.exp2(exponent)
    if COMPILED:  # a division would check the range of its denominator
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [denominator], dtype=tl.float32, is_pure=True,
            pack=1,
        )  # fmt: skip
        if EXACT:  # Newton's step: the instruction may be wrong in the last bit
            inverse += inverse * (1 - denominator * inverse)
    else:
        inverse = 1 / denominator
    return inverse


@triton.jit
def _normalize_kernel(
    x,  # (N, H·W, C)
    shift,  # None or (C,)
    means,  # (N, GROUPS, chunks)
    squares,  # (N, GROUPS, chunks)
    weight,  # (C,)
    bias,  # (C,)
    out,  # (N, H·W, C)
    pixels,
    chunks,
    tiles,
    eps,
    SILU: tl.constexpr,
    COMPILED: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    EVEN: tl.constexpr,
):
    PARTS: tl.constexpr = (GROUPS + PART - 1) // PART
    C: tl.constexpr = GROUPS * SIZE
    PADDED: tl.constexpr = triton.next_power_of_2(SIZE)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    part, chunk, image = program % PARTS, program // PARTS % chunks, program // PARTS // chunks
    x += image.to(tl.int64) * pixels * C
    out += image.to(tl.int64) * pixels * C

    length = tiles * (ROWS * PIXELS)
    end = tl.minimum((chunk + 1) * length, pixels)
    channels = _channels(part, GROUPS, SIZE, PART)
    channel, exists = channels  # pyright: ignore[reportGeneralTypeIssues]
    last = (chunk + 1) * length - ROWS * PIXELS
    offsets, mask = _tile(last, end, channel, exists, C, ROWS, PIXELS, EVEN)
    coming = tl.load(x + offsets, mask=mask, other=0.0)

    piece = tl.arange(0, CHUNKS_PADDED)
    group = part * PART + tl.arange(0, PART)
    found = (group < GROUPS)[:, None] & (piece < chunks)[None, :]
    places = (image.to(tl.int64) * GROUPS + group)[:, None] * chunks + piece[None, :]
    mean = tl.load(means + places, mask=found, other=0.0)
    square = tl.load(squares + places, mask=found, other=0.0)
    share = tl.maximum(tl.minimum(pixels - piece * length, length), 0).to(tl.float32) / pixels
    whole = tl.sum(mean * share[None, :], 1)  # (PART,)
    distance = tl.where(found, mean - whole[:, None], 0.0)
    variance = tl.sum(square, 1) / (pixels * SIZE)
    variance += tl.sum(distance * distance * share[None, :], 1)
    inverse = tl.rsqrt(variance + eps)

    # The norm of a value is factor · value + offset, with one factor and offset per channel.
    by_channel = tl.zeros((PART, PADDED), tl.float32)
    center = tl.reshape(whole[:, None] + by_channel, (PART * PADDED,))
    factor = tl.reshape(inverse[:, None] + by_channel, (PART * PADDED,))
    factor *= tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
    if shift is not None:
        center -= tl.load(shift + channel, mask=exists, other=0.0)
    offset = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32) - center * factor

    for tile in range(tiles):
        first = last - tile * (ROWS * PIXELS)
        values = coming.to(tl.float32) * factor[None, None, :] + offset[None, None, :]
        before = tl.where(tile + 1 < tiles, first - ROWS * PIXELS, pixels)
        offsets, mask = _tile(before, end, channel, exists, C, ROWS, PIXELS, EVEN)
        coming = tl.load(x + offsets, mask=mask, other=0.0)
        if SILU:
            values *= _sigmoid(values, out.dtype.element_ty == tl.float32, COMPILED)
        offsets, mask = _tile(first, end, channel, exists, C, ROWS, PIXELS, EVEN)
        tl.store(out + offsets, values.to(out.dtype.element_ty), mask=mask)


class Cut(NamedTuple):
    """How an image is divided among programs: parts (of channels) · chunks (of pixels)."""

    part: int  # groups per program
    parts: int
    pixels: int  # that one access of all threads covers
    rows: int  # accesses per tile
    tiles: int  # per chunk
    chunks: int


def cut(pixels: int, groups: int, size: int, item_size: int) -> Cut:
    """For ``pixels`` pixels, ``groups`` groups of ``size`` channels, ``item_size`` bytes each."""
    channels, padded = groups * size, power_of_two(size)
    wide = 32 if channels <= 128 else 64  # narrow: fewer partial moments to read; at least 64 bytes
    part = min(max(wide // padded, 1), power_of_two(groups))
    parts = -(-groups // part)
    at_once = max(_NUM_WARPS * 32 * (16 // item_size) // (part * padded), 1)
    at_once = min(at_once, power_of_two(pixels))
    accesses = -(-pixels // at_once)
    each = -(-accesses // max(_PROGRAMS // parts, 1))  # per program
    rows = min(power_of_two(each), _ROWS)
    tiles = -(-each // rows)
    return Cut(part, parts, at_once, rows, tiles, -(-accesses // (rows * tiles)))


def groupnorm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
    add: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """x (N, C, H, W) channels-last, weight, bias (C,) → (N, C, H, W) channels-last.

    ``out`` may be x. ``add``, ``shift`` and ``silu``: see `dit_kernels.reference.groupnorm_silu`.
    """
    if out is None:
        out = torch.empty_like(x, memory_format=torch.channels_last)
    if x.numel() == 0:
        return out
    n, channels, height, width = x.shape
    pixels, size = height * width, channels // groups
    way = cut(pixels, groups, size, x.element_size())
    moments = torch.empty(2, n, groups, way.chunks, dtype=torch.float32, device=x.device)
    even = way.pixels * way.rows * way.tiles * way.chunks == pixels
    even = even and size == power_of_two(size) and groups % way.part == 0
    constants = {"GROUPS": groups, "SIZE": size, "PART": way.part, "ROWS": way.rows,
                 "PIXELS": way.pixels, "EVEN": even, "num_warps": _NUM_WARPS}  # fmt: skip
    programs = n * way.parts * way.chunks
    launch(
        _partial_moments_kernel, programs,
        x, add, shift, *moments, pixels, way.chunks, way.tiles, **constants,
    )  # fmt: skip
    launch(
        _normalize_kernel, programs,
        x, shift, *moments, weight, bias, out, pixels, way.chunks, way.tiles, eps, SILU=silu,
        COMPILED=x.device.type != "cpu", CHUNKS_PADDED=power_of_two(way.chunks), **constants,
    )  # fmt: skip
    return out
