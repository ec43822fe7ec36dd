"""As many threads as processors are free: by made-up loads, and by a real one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dit_engine.processors import busy_seconds, cpu_quota
from dit_engine.training import threads
from dit_engine.training.threads import Sample, ThreadsByLoad, free_processors, threads_for


def test_threads_for_what_others_leave_free() -> None:
    for free, quota, expected in (
        (1.8, None, 2),  # what a desktop does beside
        (1.4, None, 1),
        (-0.1, None, 1),
        (8.0, 2.9, 2),
        (8.0, 0.5, 1),
        (3.0, 6.0, 3),
    ):
        assert threads_for(free, quota) == expected, (free, quota)
    before = Sample(wall=100.0, busy=500.0, own=50.0)
    # In ten seconds of four processors 23 are worked, 18 of them by us: half a processor by others.
    assert free_processors(before, Sample(110.0, 523.0, 68.0), 4) == 3.5
    # The two clocks are not one: ours may be ahead.
    assert free_processors(before, Sample(110.0, 519.9, 70.0), 4) == 4


def test_work_is_read_of_the_usable_processors(tmp_path: Path) -> None:
    tick = 1 / os.sysconf("SC_CLK_TCK")
    stat = tmp_path / "stat"
    stat.write_text(
        "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 1 2 4 1000 2000 8 16 32 64 128\n"
        "cpu1 100 0 0 5 5 0 0 0 0 0\ncpu10 7 0 0 0 0 0 0 0 0 0\nintr 12 0 0\n"
    )
    assert busy_seconds({0, 1}, stat) == pytest.approx(163 * tick)  # guests' is in the user's
    assert busy_seconds(None, stat) == pytest.approx(54 * tick)
    assert busy_seconds({3}, stat) is None is busy_seconds({0}, tmp_path / "none")


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("", {}, None),
        ("0::/user/me", {"user/me/cpu.max": "max 100000", "user/cpu.max": "50000 100000"}, 0.5),
        ("0::/host/path", {"cpu.max": "200000 100000"}, 2.0),  # a container's own mount
        (
            "2:cpu,cpuacct:/a\n0::/",
            {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"},
            3.0,
        ),
        ("1:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_quotas_of_control_groups(
    tmp_path: Path, groups: str, limits: dict[str, str], expected: float | None
) -> None:
    files = {f"sys/fs/cgroup/{name}": text for name, text in limits.items()}
    for name, text in ({"proc/self/cgroup": groups} | files).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert cpu_quota(tmp_path) == expected
    assert cpu_quota(tmp_path / "none") is None


def test_threads_follow_the_load_and_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others take 3 of 4 processors, then none, then more than all, while we take 1."""
    clock, samples, usual = [0.0], [Sample(0.0, 0.0, 0.0)], torch.get_num_threads()

    def later(others: float, seconds: float = 11.0) -> None:
        clock[0] += seconds
        last = samples[-1]
        samples.append(Sample(clock[0], last.busy + (others + 1) * seconds, last.own + seconds))

    monkeypatch.setattr(threads.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: later(3, seconds))
    monkeypatch.setattr(threads, "sample", lambda: samples[-1])
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(threads, "cpu_quota", lambda: None)
    torch.set_num_threads(4)
    try:
        by_load = ThreadsByLoad()
        assert torch.get_num_threads() == 1  # known before the first step
        for others, seconds, expected in (
            (0, 11.0, 4), (1.2, 11.0, 3), (5, 11.0, 1), (0, 11.0, 4),
            (3, 5.0, 4),  # not yet time to look
        ):  # fmt: skip
            later(others, seconds)
            by_load.update()
            assert torch.get_num_threads() == expected, others
        later(3)
        by_load.update()
        by_load.restore()
        assert torch.get_num_threads() == 4
        monkeypatch.setattr(threads, "sample", lambda: None)  # the system does not tell
        ThreadsByLoad().update()
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(usual)


@pytest.mark.slow
def test_a_busy_program_is_seen_and_our_own_work_is_not() -> None:
    """On one processor, which a child and this program share."""

    def free_while_working() -> float:
        before, end = threads.sample(), time.monotonic() + 0.5
        while time.monotonic() < end:
            pass
        after = threads.sample()
        assert before is not None and after is not None
        return free_processors(before, after, 1)

    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(usable)})
    try:
        alone = free_while_working()
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
            beside = free_while_working()
            child.kill()
    finally:
        os.sched_setaffinity(0, usable)
    assert beside < 0.75 and beside < alone + 0.1
