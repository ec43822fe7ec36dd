"""Going on with smaller batches when memory runs out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is some allocator's refusal, on the CPU or on a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "not enough memory" in text or "out of memory" in text or "can't allocate memory" in text
    )


def in_halves(
    run: Callable[[int, int], T], total: int, limit: int, splittable: bool = True
) -> list[T]:
    """Results of ``run(first, count)`` over ``total`` items in batches of at most ``limit``.

    A batch that runs out of memory is tried again at half the size, which then stays, with a
    warning. Raises MemoryError when a single item (or an unsplittable batch) does not fit.
    """
    results: list[T] = []
    first = 0
    while first < total:
        count = min(limit, total - first)
        failed = False
        try:
            results.append(run(first, count))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if count == 1 or not splittable:
                raise MemoryError(f"out of memory with a batch of {count}: {error}") from error
            failed = True
        # Outside the except block, where the traceback would keep the failed batch alive.
        if failed:
            limit = count // 2
            warnings.warn(f"out of memory with a batch of {count}: going on with {limit}",
                          stacklevel=3)  # fmt: skip
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        else:
            first += count
    return results
