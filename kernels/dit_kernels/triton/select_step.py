"""Copies the modulations and coefficients of one sampler step from tables in device memory.

A counter in device memory says which step it is; `dit_kernels.triton.embed` increments it. A CUDA
graph that contains both kernels needs no arguments per step, so a step is one launch of the graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.triton.launch import launch

_COEFFICIENTS = tl.constexpr(9)
_BLOCK = 1024  # words of 4 bytes


@triton.jit
def _select_step_kernel(
    modulation,  # (M, WIDTH) contiguous, as words of 4 bytes
    label,  # (M,) int64, index of each row's label in the table
    coefficients,  # (9,), as words
    where,  # (5,) int64
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # programs per row
):
    program = tl.program_id(0)
    row = (program // BLOCKS).to(tl.int64)
    column = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    step = tl.load(where)
    words = tl.pointer_type(tl.int32)
    table = tl.load(where + 1).to(words)  # (steps, labels, WIDTH)
    place = (step - tl.load(where + 2)) * tl.load(where + 3) + tl.load(label + row)
    source = table + place * WIDTH + column
    if WIDTH % 4 == 0:
        source = tl.max_contiguous(tl.multiple_of(source, 16), 4)
    tl.store(modulation + row * WIDTH + column, tl.load(source, mask=mask), mask=mask)
    if program == 0:
        number = tl.arange(0, 16)
        row_of_nine = tl.load(where + 4).to(words) + step * _COEFFICIENTS
        nine = tl.load(row_of_nine + number, mask=number < _COEFFICIENTS)
        tl.store(coefficients + number, nine, mask=number < _COEFFICIENTS)


def select_step(modulation: Tensor, label: Tensor, coefficients: Tensor, where: Tensor) -> None:
    """Write this step's values into ``modulation`` (M, W) and ``coefficients`` (9,) float32.

    Args:
        modulation: in the dtype of the table (steps, labels, W); a row has a multiple of 4 bytes.
        label: (M,) int64, the index of each row's label in the table.
        where: (5,) int64 on the device: the step; the table's address; the table's first step; its
            number of labels; the address of the coefficients (steps, 9). Both addresses are
            multiples of 16 and are not checked.
    """
    words = modulation.view(torch.int32)
    rows, width = words.shape
    blocks = -(-width // _BLOCK)
    if rows:
        launch(
            _select_step_kernel, rows * blocks,
            words, label, coefficients.view(torch.int32), where,
            WIDTH=width, BLOCK=_BLOCK, BLOCKS=blocks, num_warps=4,
        )  # fmt: skip
