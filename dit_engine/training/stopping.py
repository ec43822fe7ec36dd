"""Ctrl-C and SIGTERM while training: what was learnt is saved first."""

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
    """A signal ended the work, at a point where nothing is lost.

    exit_code: what a shell says of a program that this signal ended.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@contextmanager
def signals_noted(announcement: str) -> Iterator[Callable[[], int]]:
    """In this block the first Ctrl-C or SIGTERM prints a line and is noted, and the next one ends
    the program at once.

    Yields a function that gives the number of the signal, or 0 while there was none. In threads
    other than the main one, and for signals that the program ignores, nothing is changed.
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
        ours = [each for each in SIGNALS if signal.getsignal(each) != signal.SIG_IGN]
        before.update({each: signal.getsignal(each) for each in ours})
        for each in ours:
            signal.signal(each, note)
    try:
        yield lambda: noted
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """In this block SIGTERM raises `Stopped`, as Ctrl-C raises KeyboardInterrupt. For the main
    thread of a command."""

    def stop(number: int, _: object) -> None:
        raise Stopped("", number)

    if signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
