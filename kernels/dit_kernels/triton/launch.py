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
"""Set by `dit_kernels.triton.compiling`: kernels are then compiled and not run."""
ROWS = 4  # at most, of one program that takes whole rows


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
    """``size`` as a power of two and a smaller one; the second is 0 if one is enough.

    A tile's length is a power of two: 192 as 128 + 64 wastes nothing, as 256 it wastes 25 %. The
    last part may reach past ``size`` and is masked there: 72 with tails of at least 16 is 64 + 16.
    """
    head = power_of_two(size + 1) // 2
    if head == size:
        return size, 0
    tail = max(power_of_two(size - head), smallest_tail)
    return (head, tail) if tail < head else (2 * head, 0)


@functools.cache
def device_facts(device: torch.device) -> tuple[int, int]:
    """The GPU's major version and number of multiprocessors; a Hopper GPU's in the interpreter."""
    if device.type != "cuda":
        return 9, 132
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.multi_processor_count


def row_tile(width: int, columns: int = 40) -> dict[str, int]:
    """The tile and the warps of a kernel that takes a row at a time, ``columns`` to a thread.

    One warp needs no barrier, and knows when it is compiled which of its loads of 16 bytes are
    behind the row: 3 of 8 at 1152, which cost nothing.
    """
    warps = power_of_two(-(-width // (32 * columns)))
    return {"D": width, "BLOCK": power_of_two(width), "num_warps": min(warps, 16)}


def launch_rows(
    kernel: Any, tensors: tuple[Any, ...], rest: tuple[Any, ...], columns: int = 40,
    **constants: Any,
) -> None:  # fmt: skip
    """Start a kernel over the rows of tensors[0], (N, T, D), unless it has none.

    The kernel's arguments are the tensors, T, N·T, the rows of one program and ``rest``.
    ``columns``: as in `row_tile`.

    Raises:
        ValueError: images that `launch` refuses, or about 2³¹ rows.
    """
    n, tokens, width = tensors[0].shape
    total = n * tokens
    if tensors[0].numel() == 0:
        return
    if total > LARGEST - ROWS:  # a program's end must fit 32 bits, too
        raise ValueError(
            f"shape {tuple(tensors[0].shape)}: Triton kernels take up to {LARGEST - ROWS} rows"
        )
    # A program's rows share what they load of their image; few rows go to as many programs.
    rows = min(max(total // (16 * device_facts(tensors[0].device)[1]), 1), ROWS)
    launch(
        kernel, -(-total // rows), *tensors, tokens, total, rows, *rest,
        **row_tile(width, columns), **constants,
    )  # fmt: skip
