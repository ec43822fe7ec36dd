"""What other programs do while times are taken: read from counters, and what follows from it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dit_bench import load
from dit_bench.load import OtherLoad, not_quoted, warning

TICKS = os.sysconf("SC_CLK_TCK")


def write(
    stat: Path, user: float, system: float, idle: float, waiting: float, stolen: float
) -> None:
    """Seconds; as the kernel writes them (proc(5)): user nice system idle iowait irq softirq steal
    guest guest_nice, of which guests are in user."""
    words = [int(TICKS * s) for s in (user, 0, system, idle, waiting, 0, 0, stolen, user, 0)]
    stat.write_text(f"cpu  {' '.join(map(str, words))}\ncpu0 1 2 3\n", encoding="ascii")


class Clock:
    """Seconds that pass, and seconds of a processor that this process has had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = self.own = 0.0
        monkeypatch.setattr(load.time, "perf_counter", lambda: self.wall)
        monkeypatch.setattr(OtherLoad, "_own", lambda _: self.own)


def test_the_share_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stat = Clock(monkeypatch), tmp_path / "stat"
    write(stat, 100, 50, 1000, 7, 3)
    others = OtherLoad(stat)
    assert others.mean is None
    with others.sampled():  # 4 s: ours 6 s on two processors, others 1.0 + 0.5 + 0.5
        clock.wall, clock.own = 4.0, 6.0
        write(stat, 100 + 6 + 1.0, 50.5, 1100, 107, 3.5)
    assert others.last == others.mean == pytest.approx(0.5)
    clock.wall = 50.0  # between two parts nothing counts
    write(stat, 300, 50.5, 1100, 107, 3.5)
    with others.sampled():  # alone for 12 s
        clock.wall, clock.own = 62.0, 18.0
        write(stat, 312, 50.5, 1200, 107, 3.5)
    assert others.last == pytest.approx(0.0)
    assert others.mean == pytest.approx(4 * 0.5 / 16)
    with others.sampled():  # too short to be told of alone
        clock.wall, clock.own = 62.5, 18.5
        write(stat, 312.75, 50.5, 1200, 107, 3.5)
    assert others.last is None and others.mean == pytest.approx((2 + 0.25) / 16.5)


def test_where_the_system_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stat = Clock(monkeypatch), tmp_path / "stat"
    for text in (None, "", "cpu  0 0 0 0 0 0 0 0\n", "no numbers here\n"):
        if text is not None:
            stat.write_text(text, encoding="ascii")
        others = OtherLoad(stat)
        with others.sampled():
            clock.wall, clock.own = clock.wall + 5, clock.own + 5
        assert others.last is None and others.mean is None
    write(stat, 0, 0, 0, 0, 0)
    served = OtherLoad(stat, known=False)
    with served.sampled():
        clock.wall += 5
        write(stat, 9, 0, 0, 0, 0)
    assert served.mean is None


def test_what_is_seen_during_a_run_counts_and_not_what_was_before() -> None:
    """0.25 processors are the limit, and half a load average where nothing was seen."""
    assert not_quoted({"other_load": 0.01, "load_average": 9.0}) is None
    assert not_quoted({"other_load": 0.26, "load_average": 0.0}) == (
        "busy (other programs used 0.26 processors while times were taken)"
    )
    for unknown in ({}, {"other_load": None}):
        assert (
            not_quoted(unknown | {"load_average": 0.6}) == "busy (load average 0.60 at the start)"
        )
        assert not_quoted(unknown | {"load_average": 0.4}) is None
        assert not_quoted(unknown | {"load_average": None}) is None
    assert warning({"other_load": 1.0}) == (
        "The machine was busy (other programs used 1.00 processors while times were taken): these "
        "figures are not to be quoted."
    )
