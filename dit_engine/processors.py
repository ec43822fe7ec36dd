"""What the system says about its processors. Importing this does not import torch."""

from __future__ import annotations

import os
from collections.abc import Set
from pathlib import Path


def busy_seconds(
    processors: Set[int] | None = None, stat: Path = Path("/proc/stat")
) -> float | None:
    """How long processors have worked for all programs together since the system started, without
    idle time and waiting for disks; None where the system does not say.

    processors: their numbers; None is all of them. stat: the system's file of counters.
    """
    names = {"cpu"} if processors is None else {f"cpu{number}" for number in processors}
    ticks = []
    try:
        for line in stat.read_text(encoding="ascii").splitlines():
            name, _, counts = line.partition(" ")
            if name in names:
                user, nice, system, _idle, _wait, *more = map(int, counts.split())
                # The next three: two kinds of interrupts, and what other virtual machines took.
                ticks.append(user + nice + system + sum(more[:3]))
    except (OSError, ValueError):
        return None
    return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None


def cpu_quota(root: Path = Path("/")) -> float | None:
    """How many processors' time the control groups (of a container, say) allow this process; None
    for no limit. root: the directory that stands for "/"."""
    quotas = []
    groups = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Version 1 has a tree for each controller and two files, version 2 has one of each.
        base = groups / "cpu" if controllers else groups
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        own = base / path.lstrip("/")
        # In a container the path may be the host's; then the mount itself is the group.
        for group in (own, *own.parents[: len(own.parents) - len(base.parents)]):
            limit = " ".join(_text(group / file) for file in files).split()
            if len(limit) == 2 and all(map(str.isdecimal, limit)) and int(limit[1]):
                quotas.append(int(limit[0]) / int(limit[1]))
    return min(quotas, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
