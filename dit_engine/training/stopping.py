"""Ctrl-C and SIGTERM during a training, which end it only after a checkpoint is written."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal ended the work at a point where nothing is lost.

    exit_code: the one that a shell gives to a program which this signal ended.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@contextmanager
def signals_noted(announcement: str) -> Iterator[Callable[[], int]]:
    """In this block the first Ctrl-C or SIGTERM only prints a line and is noted. The next one ends
    the program at once.

    Yields a function that returns the number of the signal, or 0 while there was none. Nothing
    changes for signals that the program ignores, and in threads other than the main one.
    """
    noted = 0

    def note(number: int, _: object) -> None:
        nonlocal noted
        noted = number
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        with contextlib.suppress(OSError):
            # Not by print: it fails if the signal came while something was being printed.
            os.write(2, f"\n{announcement}\n".encode())

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {s: h for s in SIGNALS if (h := signal.getsignal(s)) != signal.SIG_IGN}
    for each in before:
        signal.signal(each, note)
    try:
        yield lambda: noted
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """In this block SIGTERM raises `Stopped`, as Ctrl-C raises KeyboardInterrupt. It works in the
    main thread only."""

    def stop(number: int, _: object) -> None:
        raise Stopped("", number)

    before = signal.getsignal(signal.SIGTERM)
    if before != signal.SIG_IGN:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
