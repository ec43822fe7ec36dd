"""``attention`` with keys and values fetched by tensor descriptors (TMA): Hopper and later.

It runs if a caller names it, ``dit_kernels.attention(qkv, heads, impl="triton-tma")``, and in the
lean forward if it was measured to be the fastest (`dit_kernels.chooser`).

The descriptor sees qkv as (N, T, 3·H, d), so the hardware returns zeros for tokens past T and for
columns past d, and no head reads the values of the next head.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.checks import Unavailable
from dit_kernels.triton.attention import (
    AttentionTiles,
    load_part,
    online_softmax,
    store_part,
    usual_tiles,
)
from dit_kernels.triton.launch import launch, split


@triton.jit
def _attention_tma_kernel(
    qkv,  # (N, T, 3, H, D) contiguous
    heads,  # descriptor of qkv as (N, T, 3·H, D), blocks (1, KEYS, 1, HEAD)
    tails,  # the same with blocks (1, KEYS, 1, TAIL), None when TAIL is 0
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
    image = program // blocks // H
    head = program // blocks % H
    rows = (program % blocks) * QUERIES + tl.arange(0, QUERIES)
    STRIDE: tl.constexpr = 3 * H * D
    q = qkv + image.to(tl.int64) * tokens * STRIDE + head * D
    q_head = load_part(q, rows, tokens, 0, HEAD, D, STRIDE, False)
    accumulator = tl.zeros((QUERIES, HEAD), tl.float32)
    if TAIL > 0:
        q_tail = load_part(q, rows, tokens, HEAD, TAIL, D, STRIDE, False)
        tail_accumulator = tl.zeros((QUERIES, TAIL), tl.float32)
    peak = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    for start in range(0, tokens, KEYS):
        k_head = heads.load([image, start, H + head, 0]).reshape(KEYS, HEAD)
        scores = tl.dot(q_head, tl.trans(k_head))
        if TAIL > 0:
            k_tail = tails.load([image, start, H + head, HEAD]).reshape(KEYS, TAIL)
            scores = tl.dot(q_tail, tl.trans(k_tail), scores)
        if not EVEN:
            keys = start + tl.arange(0, KEYS)
            scores = tl.where((keys < tokens)[None, :], scores, -float("inf"))
        weights, peak, total, factor = online_softmax(scores, peak, total, scale)
        weights = weights.to(q_head.dtype)
        v_head = heads.load([image, start, 2 * H + head, 0]).reshape(KEYS, HEAD)
        accumulator = tl.dot(weights, v_head, accumulator * factor[:, None])
        if TAIL > 0:
            v_tail = tails.load([image, start, 2 * H + head, HEAD]).reshape(KEYS, TAIL)
            tail_accumulator = tl.dot(weights, v_tail, tail_accumulator * factor[:, None])
    out += image.to(tl.int64) * tokens * (H * D) + head * D
    store_part(out, accumulator / total[:, None], rows, tokens, 0, HEAD, D, H * D)
    if TAIL > 0:
        tail = tail_accumulator / total[:, None]
        store_part(out, tail, rows, tokens, HEAD, TAIL, D, H * D)


def why_not(qkv: Tensor) -> str | None:
    """Why the descriptor variant cannot take ``qkv``, or None if it can."""
    if qkv.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {qkv.dtype}: torch.bfloat16 and torch.float16 are supported"
    if qkv.data_ptr() % 16:
        return "qkv does not start at a multiple of 16 bytes"
    return None


def attention_tma(
    qkv: Tensor, num_heads: int, *, out: Tensor | None = None, tiles: AttentionTiles | None = None
) -> Tensor:
    """qkv (N, T, 3·H·d) contiguous, d a multiple of 8 up to 128 → (N, T, H·d).

    Raises:
        Unavailable: float32, or a misaligned qkv. (`dit_kernels.dispatch` asks whether the GPU has
            TMA.)
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    if (reason := why_not(qkv)) is not None:
        raise Unavailable(f"impl 'triton-tma': {reason}")
    n, tokens, packed = qkv.shape
    width = packed // 3
    if out is None:
        out = qkv.new_empty(n, tokens, width)
    if qkv.numel() == 0:
        return out
    d = width // num_heads
    head, tail = split(d, smallest_tail=16)
    head = max(head, 16)
    tiles = tiles or usual_tiles(qkv, num_heads)
    blocks = -(-tokens // tiles.queries)
    heads, tails = (
        TensorDescriptor(
            qkv,
            [n, tokens, 3 * num_heads, d],
            [tokens * packed, packed, d, 1],
            [1, tiles.keys, 1, columns],
        )
        if columns
        else None
        for columns in (head, tail)
    )
    launch(
        _attention_tma_kernel, n * num_heads * blocks,
        qkv, heads, tails, out, tokens, blocks, math.log2(math.e) / math.sqrt(d),
        H=num_heads, D=d, HEAD=head, TAIL=tail, QUERIES=tiles.queries,
        KEYS=tiles.keys, EVEN=tokens % tiles.keys == 0, **tiles.options(),
    )  # fmt: skip
    return out
