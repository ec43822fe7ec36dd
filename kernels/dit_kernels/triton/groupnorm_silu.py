"""SiLU(GroupNorm(x)) in channels-last memory: partial moments, their sum, then the result.

Three launches read x twice. There are no atomics, and how an image is cut depends on its shape
alone, so results repeat exactly and do not depend on the rest of the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.triton.launch import launch, power_of_two

_TILE = 4096  # elements
_CHUNKS = 256  # most partial moments per image
_NUM_WARPS = 4


@triton.jit
def _offsets(
    first,  # pixel
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,  # channels per group
    PIXELS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
):
    """Offsets of the channels of PIXELS pixels, by group: (PIXELS, GROUPS_PADDED, SIZE_PADDED)."""
    pixel = (first + tl.arange(0, PIXELS))[:, None, None]
    group = tl.arange(0, GROUPS_PADDED)[None, :, None]
    member = tl.arange(0, SIZE_PADDED)[None, None, :]
    return pixel * (GROUPS * SIZE) + group * SIZE + member


@triton.jit
def _inside(
    first,
    pixels,  # H·W
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    PIXELS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
):
    """Which of ``_offsets`` are elements of the image."""
    mask = ((first + tl.arange(0, PIXELS)) < pixels)[:, None, None]
    mask = mask & (tl.arange(0, GROUPS_PADDED) < GROUPS)[None, :, None]
    return mask & (tl.arange(0, SIZE_PADDED) < SIZE)[None, None, :]


@triton.jit
def _partial_moments_kernel(
    x,  # (N, H·W, C)
    means,  # (N, chunks, GROUPS) float32
    squares,  # (N, chunks, GROUPS) float32: sums of squared distances from the mean
    pixels,  # H·W
    chunks,
    tiles,  # of PIXELS pixels, in a chunk
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    PIXELS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
):
    program = tl.program_id(0)
    x += (program // chunks).to(tl.int64) * pixels * (GROUPS * SIZE)
    start = (program % chunks) * tiles * PIXELS
    count = 0.0
    mean = tl.zeros((GROUPS_PADDED,), tl.float32)
    square = tl.zeros((GROUPS_PADDED,), tl.float32)
    for tile in range(tiles):
        first = start + tile * PIXELS
        offsets = _offsets(first, GROUPS, SIZE, PIXELS, GROUPS_PADDED, SIZE_PADDED)
        mask = _inside(first, pixels, GROUPS, SIZE, PIXELS, GROUPS_PADDED, SIZE_PADDED)
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        # In the last chunk, all tiles but the first may lie past the image's end.
        here = tl.maximum(tl.minimum(pixels - first, PIXELS), 0) * (SIZE * 1.0)
        tile_mean = tl.sum(tl.sum(values, 2), 0) / tl.maximum(here, 1.0)
        centered = tl.where(mask, values - tile_mean[None, :, None], 0.0)
        tile_square = tl.sum(tl.sum(centered * centered, 2), 0)
        # Chan, Golub & LeVeque 1979: moments of a union from those of its parts.
        distance = tile_mean - mean
        part = here / (count + here)
        mean += distance * part
        square += tile_square + distance * distance * count * part
        count += here
    group = tl.arange(0, GROUPS_PADDED)
    place = program.to(tl.int64) * GROUPS + group
    tl.store(means + place, mean, mask=group < GROUPS)
    tl.store(squares + place, square, mask=group < GROUPS)


@triton.jit
def _moments_kernel(
    means,  # (N, chunks, GROUPS)
    squares,  # (N, chunks, GROUPS)
    mean_out,  # (N, GROUPS)
    inverse_out,  # (N, GROUPS): 1/√(variance + eps)
    pixels,
    chunks,
    chunk,  # pixels per chunk
    eps,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, CHUNKS_PADDED)
    group = tl.arange(0, GROUPS_PADDED)
    mask = (part < chunks)[:, None] & (group < GROUPS)[None, :]
    offsets = image * chunks * GROUPS + part[:, None] * GROUPS + group[None, :]
    mean = tl.load(means + offsets, mask=mask, other=0.0)
    square = tl.load(squares + offsets, mask=mask, other=0.0)
    share = tl.maximum(tl.minimum(pixels - part * chunk, chunk), 0).to(tl.float32) / pixels
    whole = tl.sum(mean * share[:, None], 0)
    distance = tl.where(mask, mean - whole[None, :], 0.0)
    variance = tl.sum(square, 0) / (pixels * SIZE) + tl.sum(distance * distance * share[:, None], 0)
    place = image * GROUPS + group
    tl.store(mean_out + place, whole, mask=group < GROUPS)
    tl.store(inverse_out + place, tl.rsqrt(variance + eps), mask=group < GROUPS)


@triton.jit
def _normalize_silu_kernel(
    x,  # (N, H·W, C)
    mean,  # (N, GROUPS) float32
    inverse,  # (N, GROUPS) float32
    weight,  # (C,)
    bias,  # (C,)
    out,  # (N, H·W, C)
    pixels,
    blocks,  # programs per image
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    PIXELS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
):
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    x += image * pixels * (GROUPS * SIZE)
    out += image * pixels * (GROUPS * SIZE)
    first = (program % blocks) * PIXELS
    offsets = _offsets(first, GROUPS, SIZE, PIXELS, GROUPS_PADDED, SIZE_PADDED)
    mask = _inside(first, pixels, GROUPS, SIZE, PIXELS, GROUPS_PADDED, SIZE_PADDED)
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    group = tl.arange(0, GROUPS_PADDED)
    center = tl.load(mean + image * GROUPS + group, mask=group < GROUPS, other=0.0)
    factor = tl.load(inverse + image * GROUPS + group, mask=group < GROUPS, other=0.0)
    member = tl.arange(0, SIZE_PADDED)[None, :]
    channel = group[:, None] * SIZE + member
    inside = (group < GROUPS)[:, None] & (member < SIZE)
    gain = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    values = (values - center[None, :, None]) * (factor[:, None] * gain)[None, :, :]
    values += offset[None, :, :]
    values *= tl.sigmoid(values)
    tl.store(out + offsets, values.to(out.dtype.element_ty), mask=mask)


def groupnorm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """x (N, C, H, W) channels-last, weight, bias (C,) → (N, C, H, W) channels-last.

    ``out`` may be x.
    """
    if out is None:
        out = torch.empty_like(x, memory_format=torch.channels_last)
    if x.numel() == 0:
        return out
    n, channels, height, width = x.shape
    pixels, size = height * width, channels // groups
    padded = {"GROUPS_PADDED": power_of_two(groups), "SIZE_PADDED": power_of_two(size)}
    rows = max(_TILE // (padded["GROUPS_PADDED"] * padded["SIZE_PADDED"]), 1)
    rows = min(rows, power_of_two(pixels))
    blocks = -(-pixels // rows)
    tiles = -(-blocks // _CHUNKS)
    chunk = tiles * rows
    chunks = -(-pixels // chunk)
    partial = torch.empty(2, n, chunks, groups, dtype=torch.float32, device=x.device)
    moments = torch.empty(2, n, groups, dtype=torch.float32, device=x.device)
    launch(
        _partial_moments_kernel, n * chunks,
        x, partial[0], partial[1], pixels, chunks, tiles,
        GROUPS=groups, SIZE=size, PIXELS=rows, **padded, num_warps=_NUM_WARPS,
    )  # fmt: skip
    launch(
        _moments_kernel, n,
        partial[0], partial[1], moments[0], moments[1], pixels, chunks, chunk, eps,
        GROUPS=groups, SIZE=size, CHUNKS_PADDED=power_of_two(chunks),
        GROUPS_PADDED=padded["GROUPS_PADDED"], num_warps=2 * _NUM_WARPS,
    )  # fmt: skip
    launch(
        _normalize_silu_kernel, n * blocks,
        x, moments[0], moments[1], weight, bias, out, pixels, blocks,
        GROUPS=groups, SIZE=size, PIXELS=rows, **padded, num_warps=_NUM_WARPS,
    )  # fmt: skip
    return out
