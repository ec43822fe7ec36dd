"""Use as many threads as there are free processors.

torch's threads wait for each other at every operator: two threads on two processors that another
program also uses take longer than one thread alone.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass

import torch

from dit_engine.processors import busy_seconds, cpu_quota

FIRST_LOOK_S = 0.3
EVERY_S = 5.0


@dataclass(frozen=True)
class Sample:
    """At one moment: a clock, and the processor time that all programs and this one have used.

    All are in seconds.
    """

    wall: float
    busy: float
    own: float

    @classmethod
    def now(cls) -> Sample | None:
        """For the processors that this program may use; None where the system does not say."""
        if not hasattr(os, "sched_getaffinity"):
            return None
        busy = busy_seconds(os.sched_getaffinity(0))
        return None if busy is None else cls(time.monotonic(), busy, time.process_time())


class ThreadsByLoad:
    """Sets torch's number of threads to the number of processors that other programs leave free,
    but at most to the number that torch had at the beginning.

    It measures the work of others at the beginning, and again every ``EVERY_S`` seconds.
    """

    def __init__(self) -> None:
        self.most = torch.get_num_threads()
        self._before = Sample.now()
        if self.most > 1 and self._before is not None:
            time.sleep(FIRST_LOOK_S)
            self._look()

    def update(self) -> None:
        """Measure again if it is time to. Call this often."""
        if self._before is not None and time.monotonic() - self._before.wall > EVERY_S:
            self._look()

    def restore(self) -> None:
        torch.set_num_threads(self.most)

    def _look(self) -> None:
        before, after = self._before, Sample.now()
        if before is None or after is None:
            return
        free = free_processors(before, after, len(os.sched_getaffinity(0)))
        threads = min(self.most, threads_for(free, cpu_quota()))
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
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
