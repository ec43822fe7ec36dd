"""Use as many threads as there are free processors.

torch's threads wait for each other at every operator: two threads on two processors that another
program also uses take longer than one thread alone.
"""

from __future__ import annotations

import math
import os
import time
from typing import NamedTuple

import torch

from dit_engine.processors import busy_seconds, cpu_quota

FIRST_LOOK_S = 0.3
EVERY_S = 5.0


class Sample(NamedTuple):
    """A clock, and the processor time that all programs and this one have used, in seconds."""

    wall: float
    busy: float
    own: float


def sample() -> Sample | None:
    """A sample of this moment for the processors that this program may use, or None where the
    system does not count their time."""
    busy = busy_seconds(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return None if busy is None else Sample(time.monotonic(), busy, time.process_time())


class ThreadsByLoad:
    """Sets torch's number of threads to the number of processors that other programs leave free,
    but at most to the number that torch had at the beginning.

    It measures the work of others at the beginning, and again every ``EVERY_S`` seconds.
    """

    def __init__(self) -> None:
        self.most = torch.get_num_threads()
        self._before = sample()
        if self.most > 1 and self._before is not None:
            time.sleep(FIRST_LOOK_S)
            self._look(self._before)

    def update(self) -> None:
        """Measure again if it is time to. Call this often."""
        if self._before is not None and time.monotonic() - self._before.wall > EVERY_S:
            self._look(self._before)

    def restore(self) -> None:
        torch.set_num_threads(self.most)

    def _look(self, before: Sample) -> None:
        after = sample()
        if after is not None:
            free = free_processors(before, after, len(os.sched_getaffinity(0)))
            torch.set_num_threads(min(self.most, threads_for(free, cpu_quota())))
            self._before = after


def threads_for(free: float, quota: float | None = None) -> int:
    """The number of threads for ``free`` processors under a quota of processors; at least 1.

    Half a free processor counts as one. The quota is rounded down, because the system stops all
    threads once it is used up.
    """
    threads = math.floor(free + 0.5)
    return max(1, threads if quota is None else min(threads, math.floor(quota)))


def free_processors(before: Sample, after: Sample, usable: int) -> float:
    """How many of ``usable`` processors other programs did not use between two samples."""
    others = (after.busy - before.busy) - (after.own - before.own)
    return usable - max(0.0, others) / (after.wall - before.wall)
