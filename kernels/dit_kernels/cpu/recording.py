"""Calls of the native library: made, recorded, and made again.

A recording is to the CPU what a graph is to CUDA. A call from Python costs about ten microseconds
of checks and allocations, and one step of a small model makes sixty calls that compute for a few
milliseconds in all. A replay makes them one after another in C++, so the threads that wait for
the next call do not go to sleep in between.
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
from torch import Tensor

from dit_kernels.cpu.loader import DTYPE_CODES, ERRORS, loaded, prototypes

_thread = threading.local()


def call(name: str, *arguments: Any) -> None:
    """Call the library's function ``name`` on ``torch.get_num_threads()`` threads.

    Tensors are passed as their addresses, dtypes as interface.h's codes. The call is added to the
    recording that is under way in this thread, if there is one.

    Raises:
        ValueError: the function refused its arguments.
        Unavailable: there is no library.
    """
    function = getattr(loaded(), name)
    passed = tuple(
        a.data_ptr() if isinstance(a, Tensor)
        else DTYPE_CODES[a] if isinstance(a, torch.dtype)
        else a
        for a in arguments
    )  # fmt: skip
    code = function(*passed, torch.get_num_threads())
    if code != 0:
        raise ValueError(f"{name} refused {ERRORS.get(code, f'its arguments (code {code})')}")
    if (recording := current()) is not None:
        recording.add(function, passed)


class Recording:
    """Calls with their arguments, tensors as addresses.

    The caller keeps those tensors alive and in place. Only calls of the native library are
    recorded: whatever else was computed in between is not repeated.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._words = array("Q")  # as dit_replay reads them

    def __len__(self) -> int:
        return self._calls

    def add(self, function: Callable[..., int], arguments: tuple[Any, ...]) -> None:
        kinds = prototypes()[function.__name__][1]
        self._words.append(ctypes.cast(cast(Any, function), ctypes.c_void_p).value or 0)
        for kind, value in zip(kinds, arguments, strict=False):  # `replay` gives the threads
            if kind == "f":
                self._words.append(int.from_bytes(struct.pack("<f", value), "little"))
            else:
                self._words.append((value or 0) % 2**64)
        self._calls += 1

    def replay(self) -> None:
        """Make the calls again, on ``torch.get_num_threads()`` threads.

        Raises MemoryError if there is no memory for an operator's scratch.
        """
        address, _ = self._words.buffer_info()
        # The arguments were accepted before, so the only thing that can be missing is memory.
        if loaded().dit_replay(address, self._calls, torch.get_num_threads()) != 0:
            raise MemoryError("a native operator found no memory")


@contextmanager
def record() -> Iterator[Recording]:
    """Record the native calls that this thread makes inside the with block; they also run."""
    if current() is not None:
        raise RuntimeError("a recording is under way in this thread")
    _thread.recording = made = Recording()
    try:
        yield made
    finally:
        _thread.recording = None


def current() -> Recording | None:
    """The recording that is under way in this thread."""
    return getattr(_thread, "recording", None)
