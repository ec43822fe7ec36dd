"""Calls of the native library, recorded once and made again: to the CPU what a graph is to CUDA.

A call of a native operator from Python costs some ten microseconds of checks and allocations, a
small model's step makes sixty of them, and computes for a few milliseconds. Made again, they follow
each other with nothing between them, so that the threads which wait for the next need not sleep.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

from dit_kernels.cpu.loader import load, prototypes

_thread = threading.local()


class Recording:
    """Calls on addresses: the tensors behind them are the caller's to keep, and to keep in place.

    What was computed by anything but the native library is not in it.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._words = array("Q")  # of dit_replay

    def __len__(self) -> int:
        return self._calls

    def add(self, function: Callable[..., int], arguments: tuple[Any, ...]) -> None:
        kinds = prototypes()[function.__name__][1]
        self._words.append(ctypes.cast(cast(Any, function), ctypes.c_void_p).value or 0)
        for kind, value in zip(kinds, arguments, strict=False):  # the threads come with `replay`
            if kind == "f":
                self._words.append(int.from_bytes(struct.pack("<f", value), "little"))
            else:
                self._words.append((value or 0) % 2**64)
        self._calls += 1

    def replay(self) -> None:
        """Make the calls again, on ``torch.get_num_threads()`` threads.

        Raises MemoryError where there is no memory for an operator's scratch.
        """
        library = load()[0]
        assert library is not None  # it made the calls
        address, _ = self._words.buffer_info()
        # Arguments that were taken once are taken again: what may be missing is memory.
        if library.dit_replay(address, self._calls, torch.get_num_threads()) != 0:
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
