"""A run that ends in time: what is left of it, and of its parts.

Work is not begun without time for it. Nothing that has begun is cut short: an exception raised
from a signal handler crashes CPython 3.11 once torch.compile has run in the process. What hangs is
ended with the process (`dit_bench.gpu.stop_late`).
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Budget:
    """So many seconds from now on.

    Args:
        seconds: how many.
        clock: seconds since any fixed moment.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Seconds left, 0 if none."""
        return max(0.0, self._end - self._clock())

    def part(self, share: float) -> Budget:
        """A budget that ends when ``share`` (0 … 1) of what is left now has passed."""
        return Budget(share * self.left(), self._clock)
