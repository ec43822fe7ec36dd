"""What every launcher needs: a launch on the right device, and tile sizes that fit a width."""

from __future__ import annotations

import contextlib
import functools
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

LARGEST = 2**31 - 1
ONLY_COMPILING = ContextVar("dit_kernels_only_compiling", default=False)
"""True inside `dit_kernels.triton.compiling.only_compiling`: kernels are compiled and not run."""
ROWS = 4  # at most so many rows per program of a kernel that takes whole rows


def launch(kernel: Any, programs: int, x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Start ``programs`` of a kernel whose first argument is x, on x's device and current stream.

    Triton launches on the current device, which may be another one than x's.

    Raises:
        ValueError: images of 2³¹ numbers or more, whose offsets would not fit 32 bits.
    """
    if x.ndim > 2 and x.numel() // len(x) > LARGEST:
        raise ValueError(
            f"shape {tuple(x.shape)}: Triton kernels take images of up to {LARGEST} numbers"
        )
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    with torch.cuda.device(x.device) if elsewhere else contextlib.nullcontext():
        if ONLY_COMPILING.get():
            kernel.warmup(x, *arguments, grid=(programs,), **constants)
        else:
            kernel[(programs,)](x, *arguments, **constants)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def split(size: int, smallest_tail: int = 1) -> tuple[int, int]:
    """``size`` as the sum of a power of two and a smaller one, or of a power of two and 0.

    The length of a tile is a power of two: 128 + 64 wastes nothing of 192 columns, and 256 wastes
    25 %. The sum may exceed ``size``, and kernels mask the rest: 72 with tails of at least 16 is
    64 + 16.
    """
    head = power_of_two(size + 1) // 2
    if head == size:
        return size, 0
    tail = max(power_of_two(size - head), smallest_tail)
    return (head, tail) if tail < head else (2 * head, 0)


@functools.cache
def device_facts(device: torch.device) -> tuple[int, int]:
    """The major compute capability and the number of multiprocessors of a GPU. For other devices,
    which run Triton's interpreter, these are a Hopper GPU's: (9, 132)."""
    if device.type != "cuda":
        return 9, 132
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.multi_processor_count


def row_tile(width: int, columns: int = 40) -> dict[str, int]:
    """The constants of a kernel that takes one row at a time: its width, its tile and its warps.

    There are enough warps that a thread has at most ``columns`` columns. With one warp no barrier
    is needed, and the compiler knows which 16-byte loads lie past the end of the row, and drops
    them: 3 of 8 at a width of 1152.
    """
    warps = power_of_two(-(-width // (32 * columns)))
    return {"D": width, "BLOCK": power_of_two(width), "num_warps": min(warps, 16)}


def launch_rows(
    kernel: Any, tensors: tuple[Any, ...], rest: tuple[Any, ...], columns: int = 40,
    **constants: Any,
) -> None:  # fmt: skip
    """Start a kernel over the rows of tensors[0], (N, T, D); nothing is started if it is empty.

    The kernel's arguments are the tensors, T, N·T, the rows per program, and ``rest``.
    ``columns`` is that of `row_tile`.

    Raises:
        ValueError: images that `launch` refuses, or more than 2³¹ − 5 rows.
    """
    n, tokens, width = tensors[0].shape
    total = n * tokens
    if tensors[0].numel() == 0:
        return
    if total > LARGEST - ROWS:  # a program's end must fit 32 bits, too
        raise ValueError(
            f"shape {tuple(tensors[0].shape)}: Triton kernels take up to {LARGEST - ROWS} rows"
        )
    # The rows of a program share the loads of their image's vectors. Few rows get one program each.
    rows = min(max(total // (16 * device_facts(tensors[0].device)[1]), 1), ROWS)
    launch(
        kernel, -(-total // rows), *tensors, tokens, total, rows, *rest,
        **row_tile(width, columns), **constants,
    )  # fmt: skip
