"""Calls of the native library, recorded once and made again: to the CPU what a graph is to CUDA.

A call of a native operator from Python costs some ten microseconds of checks and allocations, a
small model's step makes sixty of them, and computes for a few milliseconds. Made again, a call
costs one or two.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_thread = threading.local()


class Recording:
    """Calls on addresses: the tensors behind them are the caller's to keep, and to keep in place.

    What was computed by anything but the native library is not in it.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Callable[..., int], tuple[Any, ...]]] = []

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, function: Callable[..., int], arguments: tuple[Any, ...]) -> None:
        self._calls.append((function, arguments))

    def replay(self) -> None:
        """Make the calls again, on ``torch.get_num_threads()`` threads.

        Raises MemoryError where there is no memory for an operator's scratch.
        """
        threads = torch.get_num_threads()
        for function, arguments in self._calls:
            # Arguments that were taken once are taken again: what may be missing is memory.
            if function(*arguments, threads) != 0:
                raise MemoryError("a native operator found no memory")


@contextmanager
def record() -> Iterator[Recording]:
    """Record the native calls that this thread makes; they are made as ever."""
    if current() is not None:
        raise RuntimeError("a recording is under way in this thread")
    _thread.recording = made = Recording()
    try:
        yield made
    finally:
        _thread.recording = None


def current() -> Recording | None:
    """This thread's recording that is under way."""
    return getattr(_thread, "recording", None)
