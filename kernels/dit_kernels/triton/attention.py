"""Flash attention forward (Dao et al. 2022) straight from the packed projection.

q, k and v are read where they lie in (N, T, 3, H, d), and the result is written as (N, T, H·d).
A head dimension that is no power of two is held as two tiles, 72 as 64 + 16 with 8 columns masked,
rather than padded to 128.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.triton.launch import device_facts, launch, power_of_two, split


@triton.jit
def online_softmax(
    scores,  # (M, B) float32, not yet scaled
    peak,  # (M,) the largest scaled score so far
    total,  # (M,) the sum of the weights so far
    scale,  # log2(e) · d^-½, so that exp2 serves
):
    """Weights of these keys, (M, B); the new peak and total; the factor of what came before.

    Scores beyond about 10⁹ may give NaN: in the fused multiply-subtract, the rounding of ``base``
    gets into a weight's exponent. (Subtracting first would cost one more instruction per score.)
    """
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    # A row that has only -inf so far must not become NaN before all keys were seen.
    base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    weights = tl.exp2(scores * scale - base[:, None])
    factor = tl.exp2(peak - base)
    return weights, new_peak, total * factor + tl.sum(weights, 1), factor


@triton.jit
def load_part(
    pointer,  # of one head's first row
    rows,  # (R,)
    tokens,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    STRIDE: tl.constexpr,  # between rows
    EVEN: tl.constexpr,  # no row is past the last token
):
    """Columns START to START + WIDTH of a head, (R, WIDTH); 0 outside it."""
    columns = START + tl.arange(0, WIDTH)
    pointers = pointer + rows[:, None] * STRIDE + columns[None, :]
    if START + WIDTH > D:
        inside = (columns < D)[None, :] & (rows < tokens)[:, None]
        values = tl.load(pointers, mask=inside, other=0.0)
    elif EVEN:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=(rows < tokens)[:, None], other=0.0)
    return values


@triton.jit
def store_part(
    pointer,
    values,  # (R, WIDTH)
    rows,
    tokens,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
):
    columns = START + tl.arange(0, WIDTH)
    mask = (rows < tokens)[:, None]
    if START + WIDTH > D:
        mask = mask & (columns < D)[None, :]
    pointers = pointer + rows[:, None] * STRIDE + columns[None, :]
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _attention_kernel(
    qkv,  # (N, T, 3, H, D) contiguous
    out,  # (N, T, H, D) contiguous
    tokens,  # T
    blocks,  # programs per head
    scale,  # log2(e) / √D
    H: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    EVEN: tl.constexpr,  # KEYS divides T
):
    program = tl.program_id(0)
    image = (program // blocks // H).to(tl.int64)
    head = program // blocks % H
    rows = (program % blocks) * QUERIES + tl.arange(0, QUERIES)
    STRIDE: tl.constexpr = 3 * H * D
    q = qkv + image * tokens * STRIDE + head * D
    k = q + H * D
    v = k + H * D
    q_head = load_part(q, rows, tokens, 0, HEAD, D, STRIDE, False)
    accumulator = tl.zeros((QUERIES, HEAD), tl.float32)
    if TAIL > 0:
        q_tail = load_part(q, rows, tokens, HEAD, TAIL, D, STRIDE, False)
        tail_accumulator = tl.zeros((QUERIES, TAIL), tl.float32)
    peak = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    for start in range(0, tokens, KEYS):
        keys = start + tl.arange(0, KEYS)
        k_head = load_part(k, keys, tokens, 0, HEAD, D, STRIDE, EVEN)
        scores = tl.dot(q_head, tl.trans(k_head), input_precision="ieee")
        if TAIL > 0:
            k_tail = load_part(k, keys, tokens, HEAD, TAIL, D, STRIDE, EVEN)
            scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision="ieee")
        if not EVEN:
            scores = tl.where((keys < tokens)[None, :], scores, -float("inf"))
        weights, peak, total, factor = online_softmax(scores, peak, total, scale)
        weights = weights.to(q_head.dtype)
        v_head = load_part(v, keys, tokens, 0, HEAD, D, STRIDE, EVEN)
        accumulator = tl.dot(
            weights, v_head, accumulator * factor[:, None], input_precision="ieee"
        )  # fmt: skip
        if TAIL > 0:
            v_tail = load_part(v, keys, tokens, HEAD, TAIL, D, STRIDE, EVEN)
            tail_accumulator = tl.dot(
                weights, v_tail, tail_accumulator * factor[:, None], input_precision="ieee"
            )  # fmt: skip
    out += image * tokens * (H * D) + head * D
    store_part(out, accumulator / total[:, None], rows, tokens, 0, HEAD, D, H * D)
    if TAIL > 0:
        tail = tail_accumulator / total[:, None]
        store_part(out, tail, rows, tokens, HEAD, TAIL, D, H * D)


class AttentionTiles(NamedTuple):
    """The tile sizes of a launch, and options of Triton's compiler."""

    queries: int
    keys: int
    num_stages: int
    num_warps: int
    maxnreg: int | None  # most registers per thread

    def __str__(self) -> str:
        return f"{self.queries}x{self.keys}, {self.num_warps} warps, {self.num_stages} stages"

    def options(self) -> dict[str, int | None]:
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.maxnreg,
        }


# Major version → (queries, keys, stages) that fit the shared memory of all its GPUs.
TILES = {8: (128, 64, 2), 9: (128, 64, 3), 10: (128, 64, 3), 12: (128, 64, 2)}
# Exact float32 products have no tensor cores, and registers bound the tile.
FLOAT32_TILES = (32, 32, 1)
WIDE_FLOAT32_TILES = (16, 32, 1)  # d above 80


def attention_tiles(
    tokens: int, heads: int, d: int, dtype: torch.dtype, major: int, processors: int
) -> AttentionTiles:
    """Tiles for N·H = ``heads`` on a GPU of that major version and number of multiprocessors.

    A program takes fewer queries if 128 would leave multiprocessors idle; keys keep their order.
    """
    queries, keys, stages = TILES.get(major, TILES[8])
    if dtype == torch.float32:
        queries, keys, stages = FLOAT32_TILES if d <= 80 else WIDE_FLOAT32_TILES
    elif heads * -(-tokens // queries) < processors:
        queries = 64
    fitting = max(power_of_two(tokens), 16)
    queries, keys = min(queries, fitting), min(keys, fitting)
    if dtype == torch.float32:
        return AttentionTiles(queries, keys, stages, num_warps=4, maxnreg=None)
    # With 128 registers two programs of 8 warps share a multiprocessor. At d = 72 the compiler
    # would take 131 on Hopper, but needs no spills with 128; on other GPUs it would spill.
    bound = 128 if major == 9 and d <= 80 and queries == 128 else None
    return AttentionTiles(queries, keys, stages, num_warps=queries // 16, maxnreg=bound)


def usual_tiles(qkv: Tensor, num_heads: int) -> AttentionTiles:
    """`attention_tiles` for qkv (N, T, 3·H·d) on its device."""
    n, tokens, packed = qkv.shape
    d = packed // 3 // num_heads
    return attention_tiles(tokens, n * num_heads, d, qkv.dtype, *device_facts(qkv.device))


# Tiles for Hopper with d up to 80; none of them spills registers. 128x128 with 4 warps would.
POINTERS = (
    AttentionTiles(128, 64, 3, 8, 128),
    AttentionTiles(64, 64, 3, 4, None),
    AttentionTiles(128, 128, 2, 8, None),
)
DESCRIPTORS = (
    AttentionTiles(128, 64, 3, 8, None),
    AttentionTiles(128, 64, 2, 4, None),
    AttentionTiles(128, 128, 2, 8, None),
    AttentionTiles(64, 128, 2, 4, None),
    AttentionTiles(64, 64, 2, 4, None),
)


def candidates(
    n: int, tokens: int, heads: int, d: int, dtype: torch.dtype, device: torch.device
) -> dict[str, list[AttentionTiles]]:
    """Tiles for half precision that are worth measuring: "triton" for this kernel, with
    `attention_tiles` first, and "triton-tma" for the kernel of `dit_kernels.triton.attention_tma`.
    """
    major, processors = device_facts(device)
    usual = attention_tiles(tokens, n * heads, d, dtype, major, processors)
    if major != 9 or d > 80:
        return {"triton": [usual], "triton-tma": [usual]}

    def fitting(tiles: tuple[AttentionTiles, ...]) -> list[AttentionTiles]:
        return [each for each in tiles if max(each.queries, each.keys) <= power_of_two(tokens)]

    pointers = dict.fromkeys([usual, *fitting(POINTERS)])
    return {"triton": [*pointers], "triton-tma": fitting(DESCRIPTORS)}


def attention(
    qkv: Tensor, num_heads: int, *, out: Tensor | None = None, tiles: AttentionTiles | None = None
) -> Tensor:
    """qkv (N, T, 3·H·d) contiguous, d a multiple of 8 up to 128 → (N, T, H·d).

    tiles: `usual_tiles` unless given.
    """
    n, tokens, packed = qkv.shape
    width = packed // 3
    if out is None:
        out = qkv.new_empty(n, tokens, width)
    if qkv.numel() == 0:
        return out
    d = width // num_heads
    head, tail = split(d, smallest_tail=16)
    tiles = tiles or usual_tiles(qkv, num_heads)
    blocks = -(-tokens // tiles.queries)
    launch(
        _attention_kernel, n * num_heads * blocks,
        qkv, out, tokens, blocks, math.log2(math.e) / math.sqrt(d),
        H=num_heads, D=d, HEAD=max(head, 16), TAIL=tail, QUERIES=tiles.queries,
        KEYS=tiles.keys, EVEN=tokens % tiles.keys == 0, **tiles.options(),
    )  # fmt: skip
    return out
