"""How much other programs used the processors during a measurement, and what follows from it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dit_bench.machine import BUSY
from dit_bench.report import NO_VERDICT
from dit_engine.processors import busy_seconds

OTHERS = 0.25
"""Processors that other programs may keep busy, on average, while times are taken."""
_LEAST_S = 1.0  # the system counts in hundredths of a second: a shorter time is too coarse


class OtherLoad:
    """Processors that others kept busy: ``last`` in the last block of `sampled`, ``mean`` in all
    blocks; None for less than a second or if the system does not tell.

    known: False if another process works for this one, as a server does.
    """

    def __init__(self, stat: Path = Path("/proc/stat"), known: bool = True) -> None:
        self._stat, self._known = stat, known
        self._others = self._wall = 0.0
        self.last: float | None = None

    @property
    def mean(self) -> float | None:
        return self._others / self._wall if self._wall >= _LEAST_S else None

    @contextmanager
    def sampled(self) -> Iterator[None]:
        before = self._seconds()
        try:
            yield
        finally:
            wall, own, busy = (b - a for a, b in zip(before, self._seconds(), strict=True))
            self.last = None
            # In a sandbox the system's file may hold only zeros.
            if self._known and wall > 0 and busy >= own / 2:
                others = max(0.0, busy - own)
                self._others += others
                self._wall += wall
                self.last = others / wall if wall >= _LEAST_S else None

    def _seconds(self) -> tuple[float, float, float]:
        """Seconds of the clock, of this process with its children, of all processors (or NaN)."""
        busy = busy_seconds(stat=self._stat)
        return time.perf_counter(), sum(os.times()[:4]), float("nan") if busy is None else busy


def not_quoted(report: dict[str, Any]) -> str | None:
    """Why the times of ``report`` are not to be quoted, to follow "the machine was"; else None.

    The load during the run counts; if that is unknown, the load average before the run does.
    """
    others, load = report.get("other_load"), report.get("load_average")
    if others is not None:
        why = f"busy (other programs used {others:.2f} processors while times were taken)"
        return why if others > OTHERS else None
    return f"busy (load average {load:.2f} at the start)" if (load or 0) > BUSY else None


def busy_row(row: dict[str, Any]) -> bool:
    """Whether other programs worked while this row was timed."""
    return (row.get("other_load") or 0) > OTHERS


def withdraw_verdicts(report: dict[str, Any]) -> None:
    """Replace the verdicts on times that are not to be quoted by `NO_VERDICT`."""
    all_of_it = not_quoted(report) is not None
    for row in [*report["rows"], *report.get("ratios", [])]:
        if all_of_it or busy_row(row):
            if "verdict" in row and row["role"] == "peer":
                row["verdict"] = NO_VERDICT
            if row.get("result") in ("pass", "miss") and row.get("section") != "memory":
                row["result"] = NO_VERDICT


def warning(report: dict[str, Any]) -> str | None:
    """The sentence that stands beside figures that are not to be quoted."""
    why = not_quoted(report)
    return why and f"The machine was {why}: these figures are not to be quoted."
