"""A run that ends in time: what is left of it, and a limit on any one piece of work."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_AGAIN = 5.0  # seconds until the alarm is repeated, if something swallowed the exception


class OutOfTime(BaseException):
    """A piece of work took too long. No `Exception`, so that no library handles it on the way."""


class Budget:
    """So many seconds from now on.

    Args:
        seconds: how many.
        clock: seconds since any fixed moment.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Seconds left, 0 if none."""
        return max(0.0, self._end - self._clock())

    def part(self, share: float) -> Budget:
        """A budget that ends when ``share`` (0 … 1) of what is left now has passed."""
        return Budget(share * self.left(), self._clock)

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """`time_limit` of ``seconds``, or of what is left if that is less."""
        left = self.left()
        with time_limit(seconds) if seconds <= left else time_limit(left, "time budget"):
            yield


@contextmanager
def time_limit(seconds: float, reason: str | None = None) -> Iterator[None]:
    """Raise `OutOfTime` in the block, with ``reason``, once it has run for ``seconds``.

    The signal is handled between two steps of the Python interpreter: a call into a library is
    not cut short. Outside the main thread, and where there is no SIGALRM, there is no limit.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise OutOfTime(reason or f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), _AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
