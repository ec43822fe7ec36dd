"""As many threads as there are free processors, as torch's wait for each other at each operator.

Two threads on two processors that a third program shares take longer than one alone would.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import torch

FIRST_LOOK_S = 0.3
EVERY_S = 5.0


@dataclass(frozen=True)
class Sample:
    """Seconds of processor time used by all programs and by this one, up to one moment."""

    wall: float
    busy: float
    own: float

    @classmethod
    def now(cls) -> Sample | None:
        """Of the processors that this program may use; None where the system does not tell."""
        try:
            usable = os.sched_getaffinity(0)
            busy = busy_seconds(Path("/proc/stat").read_text(encoding="utf-8"), usable)
        except (AttributeError, OSError, ValueError):
            return None
        return cls(time.monotonic(), busy, time.process_time())


class ThreadsByLoad:
    """Sets torch's number of threads to the processors that others leave free.

    The number that torch has at the beginning is the most. Others' work is what the processors do
    beside this program's own, looked at once at the beginning and then every ``EVERY_S`` seconds.
    """

    def __init__(self) -> None:
        self.most = torch.get_num_threads()
        self._before = Sample.now()
        if self.most > 1 and self._before is not None:
            time.sleep(FIRST_LOOK_S)
            self._look()

    def update(self) -> None:
        """To be called now and then; looks where it is time to."""
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
    """The number of threads for ``free`` processors of which a quota allows ``quota``; at least 1.

    Half a free processor or more counts as one. A quota is rounded down, because the system stops
    all threads once it is used up.
    """
    threads = math.floor(free + 0.5)
    return max(1, threads if quota is None else min(threads, math.floor(quota)))


def free_processors(before: Sample, after: Sample, usable: int) -> float:
    """Of ``usable`` processors, what others did not use between two samples."""
    others = (after.busy - before.busy) - (after.own - before.own)
    return usable - max(0.0, others) / (after.wall - before.wall)


def busy_seconds(stat: str, usable: Set[int]) -> float:
    """By the text of /proc/stat: all time of these processors but idle and waiting for disks."""
    ticks = 0
    for line in stat.splitlines():
        name, _, rest = line.partition(" ")
        if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in usable:
            user, nice, system, _idle, _wait, *more = map(int, rest.split())
            ticks += user + nice + system + sum(more[:3])  # interrupts (2), stolen by other guests
    return ticks / os.sysconf("SC_CLK_TCK")


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The processors whose time a control group (of a container, say) allows; None for no limit."""
    quotas = []
    groups = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        if line.count(":") < 2:
            continue
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = groups / "cpu" if controllers else groups
        own = base / path.lstrip("/")
        # Within a container the path may be the host's; then the mount itself is the group's.
        for group in (own, *own.parents):
            if group == base.parent:
                break
            if controllers:
                limit = f"{_text(group / 'cpu.cfs_quota_us')} {_text(group / 'cpu.cfs_period_us')}"
            else:
                limit = _text(group / "cpu.max")
            allowed, _, period = " ".join(limit.split()).partition(" ")
            if allowed.isdecimal() and period.isdecimal() and int(period):
                quotas.append(int(allowed) / int(period))
    return min(quotas, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
