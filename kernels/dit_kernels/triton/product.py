"""Matrix products x · weightᵀ with fused epilogues for Hopper, whose operands are loaded by TMA.

The kernel is persistent: each of n programs computes every n-th tile of the result. Tiles are
numbered along the columns first, so tiles that run at the same time share few rows of x and all of
the weight, which stays in the L2 cache. If two programs share a multiprocessor, one multiplies
while the other writes. A program that has a multiprocessor to itself fuses its loop over tiles with
the loop over K, so that the next tile's operands are loaded while this tile is written.

Letters: R rows, K inputs, M outputs, S splits of K, N images, T tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.checks import Unavailable
from dit_kernels.triton.launch import device_facts, launch, split
from dit_kernels.triton.product_tiles import ProductTiles, candidates

__all__ = (
    "ProductTiles", "candidates", "product", "product_gate_residual", "product_partial_sums",
    "why_not",
)  # fmt: skip


@triton.jit
def _tanh_gelu(values, APPROXIMATE: tl.constexpr):
    half = 0.5 * values
    inner = values * (0.7978845608028654 + 0.035677408136300125 * values * values)
    if APPROXIMATE:
        # One instruction, whose relative error is at most 2⁻¹¹. It moves a result by at most 2⁻¹²
        # of the value, no more than rounding the value to float16 may.
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [inner], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        tanh = 2 * tl.sigmoid(2 * inner) - 1
    return half + half * tanh


@triton.jit
def _write(
    out,  # descriptor of the result as (S, R, M), blocks (1, ROWS, PART)
    bias,  # (M,), None for partial sums
    gate,  # (N, M), rows gate_stride apart, or None
    sums,  # (ROWS, WIDTH) float32
    part,  # index among the S splits
    row,  # first row of the tile
    column,  # first column of the tile
    rows,  # R
    tokens,  # T
    gate_stride,
    M: tl.constexpr,
    GELU: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    ONE_IMAGE: tl.constexpr,  # ROWS divides T
    PART: tl.constexpr,
):
    """The epilogue, PART columns at a time, which bounds the shared memory for the result."""
    ROWS: tl.constexpr = sums.shape[0]
    WIDTH: tl.constexpr = sums.shape[1]
    if WIDTH > PART:
        # Both halves stay in the registers in which they are.
        left, right = tl.split(tl.permute(tl.reshape(sums, (ROWS, 2, WIDTH // 2)), (0, 2, 1)))
        _write(
            out, bias, gate, left, part, row, column, rows, tokens, gate_stride,
            M, GELU, APPROXIMATE, ONE_IMAGE, PART,
        )  # fmt: skip
        _write(
            out, bias, gate, right, part, row, column + WIDTH // 2, rows, tokens, gate_stride,
            M, GELU, APPROXIMATE, ONE_IMAGE, PART,
        )  # fmt: skip
    else:
        columns = column + tl.arange(0, WIDTH)
        inside = (columns < M)[None, :]
        values = sums
        if bias is not None:
            values += tl.load(bias + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if GELU:
            values = _tanh_gelu(values, APPROXIMATE)
        if gate is not None:
            if ONE_IMAGE:
                gate += (row // tokens).to(tl.int64) * gate_stride
                factor = tl.load(gate + columns[None, :], mask=inside, other=0.0)
            else:
                each = row + tl.arange(0, ROWS)
                images = (each // tokens).to(tl.int64)[:, None] * gate_stride
                inside = inside & (each < rows)[:, None]
                factor = tl.load(gate + images + columns[None, :], mask=inside, other=0.0)
            residual = out.load([part, row, column]).reshape(ROWS, WIDTH)
            values = residual.to(tl.float32) + factor.to(tl.float32) * values
        out.store([part, row, column], values.to(out.dtype).reshape(1, ROWS, WIDTH))


@triton.jit(do_not_specialize=["rows", "tokens"])
def _product_kernel(
    result,  # (S·R, M), written only through the descriptors out_head and out_tail
    x,  # descriptor of (R, K), blocks (ROWS, DEPTH)
    weight_head,  # descriptor of (M, K), blocks (HEAD, DEPTH)
    weight_tail,  # the same with blocks (TAIL, DEPTH), None when TAIL is 0
    out_head,  # descriptor of (S, R, M), blocks (1, ROWS, HEAD_PART)
    out_tail,  # the same with blocks (1, ROWS, TAIL_PART), None when TAIL is 0
    bias,
    gate,
    rows,  # R
    tokens,  # T
    gate_stride,
    K: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    FUSED_LOOPS: tl.constexpr,
    GELU: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    ONE_IMAGE: tl.constexpr,
    HEAD_PART: tl.constexpr,
    TAIL_PART: tl.constexpr,
):
    across = tl.cdiv(M, HEAD + TAIL)
    tiles = tl.cdiv(rows, ROWS) * across
    steps = tl.cdiv(K, DEPTH)
    for index in tl.range(
        tl.program_id(0), tiles * SPLITS, tl.num_programs(0), flatten=FUSED_LOOPS
    ):
        part, begin, end = 0, 0, steps
        if SPLITS > 1:
            part = index // tiles
            begin, end = steps * part // SPLITS, steps * (part + 1) // SPLITS
        row = index % tiles // across * ROWS
        column = index % tiles % across * (HEAD + TAIL)
        head = tl.zeros((ROWS, HEAD), tl.float32)
        if TAIL > 0:
            tail = tl.zeros((ROWS, TAIL), tl.float32)
        for step in range(begin, end):
            k = step * DEPTH
            rows_of_x = x.load([row, k])
            head = tl.dot(rows_of_x, weight_head.load([column, k]).T, head)
            if TAIL > 0:
                tail = tl.dot(rows_of_x, weight_tail.load([column + HEAD, k]).T, tail)
        _write(
            out_head, bias, gate, head, part, row, column, rows, tokens, gate_stride,
            M, GELU, APPROXIMATE, ONE_IMAGE, HEAD_PART,
        )  # fmt: skip
        if TAIL > 0:
            _write(
                out_tail, bias, gate, tail, part, row, column + HEAD, rows, tokens, gate_stride,
                M, GELU, APPROXIMATE, ONE_IMAGE, TAIL_PART,
            )  # fmt: skip


def why_not(x: Tensor, weight: Tensor) -> str | None:
    """Why this kernel cannot multiply x (…, K) and weight (M, K), or None if it can."""
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        return f"dtypes {x.dtype} and {weight.dtype}: both bfloat16 or both float16 are supported"
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.stride(-1) != 1 or any(stride % 8 for stride in tensor.stride()[:-1]):
            return f"{name} of strides {tensor.stride()}: multiples of 8 and then 1 are needed"
        if tensor.device.type != "meta" and tensor.data_ptr() % 16:
            return f"{name} does not start at a multiple of 16 bytes"
    if len(weight) % 8:
        return f"{len(weight)} outputs: a multiple of 8 is needed"
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] != 9:
        major, minor = torch.cuda.get_device_capability(x.device)
        return f"compute capability {major}.{minor}: only 9.0 (Hopper) is supported"
    return None


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    tiles: ProductTiles,
    *,
    gelu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """x (…, K) · weight (M, K)ᵀ + bias (M,), then tanh-GELU if ``gelu`` → (…, M) contiguous.

    Raises:
        Unavailable: operands that `why_not` refuses.
    """
    if out is None:
        out = x.new_empty(*x.shape[:-1], len(weight))
    _launch(x, weight, bias, out.view(1, -1, len(weight)), tiles, gelu=gelu)
    return out


def product_gate_residual(
    x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, residual: Tensor, tiles: ProductTiles
) -> Tensor:
    """residual (N, T, M) += gate (N, M) · (x (N, T, K) · weight (M, K)ᵀ + bias (M,)), rounded once.

    ``residual`` is contiguous, is overwritten and is returned. The rows of gate may have any
    stride.

    Raises:
        Unavailable: operands that `why_not` refuses.
    """
    _launch(x, weight, bias, residual.view(1, -1, len(weight)), tiles, gate=gate)
    return residual


def product_partial_sums(
    x: Tensor, weight: Tensor, tiles: ProductTiles, *, out: Tensor | None = None
) -> Tensor:
    """x (N, T, K) · weight (M, K)ᵀ over each of S = ``tiles.splits`` parts of K → (S, N, T, M).

    The result is float32. The kernel that reads it must add up the S sums and the bias.

    Raises:
        Unavailable: operands that `why_not` refuses.
    """
    if out is None:
        shape = tiles.splits, *x.shape[:-1], len(weight)
        out = torch.empty(shape, dtype=torch.float32, device=x.device)
    _launch(x, weight, None, out.view(tiles.splits, -1, len(weight)), tiles)
    return out


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,  # (S, R, M)
    tiles: ProductTiles,
    *,
    gelu: bool = False,
    gate: Tensor | None = None,
) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    if (reason := why_not(x, weight)) is not None:
        raise Unavailable(f"product: {reason}")
    if out.numel() == 0:
        return
    if out.device.type != "meta" and out.data_ptr() % 16:
        raise Unavailable("product: the result does not start at a multiple of 16 bytes")
    tokens = x.shape[-2] if gate is not None else 1
    x = x.reshape(-1, x.shape[-1])
    splits, rows, outputs = out.shape
    head, tail = split(tiles.columns)
    # Bytes per row of the part that is in shared memory at once; a residual is loaded through it.
    written = 256 if tiles.num_warps == 8 and gate is None else 128
    head_part, tail_part = (min(written // out.element_size(), side) for side in (head, tail))

    def described(tensor: Tensor, *block: int) -> TensorDescriptor:
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))

    count = -(-outputs // tiles.columns) * -(-rows // tiles.rows) * splits
    programs = min(count, device_facts(x.device)[1] * (1 if tiles.num_warps == 8 else 2))
    # With two accumulators, ptxas would make each matrix instruction wait (its warning C7515).
    fused_loops = count > programs and tiles.num_warps == 8 and tail == 0 and splits == 1
    launch(
        _product_kernel, programs,
        out.view(-1, outputs),
        described(x, tiles.rows, tiles.depth), described(weight, head, tiles.depth),
        described(weight, tail, tiles.depth) if tail else None,
        described(out, 1, tiles.rows, head_part),
        described(out, 1, tiles.rows, tail_part) if tail else None,
        bias, gate, rows, tokens, gate.stride(0) if gate is not None else 0,
        K=x.shape[1], M=outputs, ROWS=tiles.rows, HEAD=head, TAIL=tail, DEPTH=tiles.depth,
        SPLITS=splits, FUSED_LOOPS=fused_loops, GELU=gelu, APPROXIMATE=x.device.type != "cpu",
        ONE_IMAGE=gate is not None and tokens % tiles.rows == 0,
        HEAD_PART=head_part, TAIL_PART=tail_part,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
