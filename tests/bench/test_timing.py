"""Timing, budgets, ceilings and other programs' load in closed form, with clocks of the tests."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch

from dit_bench import ceilings, load, timing
from dit_bench.ceilings import Ceilings, measure_ceilings
from dit_bench.load import OtherLoad, not_quoted, warning
from dit_bench.progress import Progress
from dit_bench.timing import Budget, Spread, interleave, ratio, spread


class Clock:
    """Time passes only while a function of this clock runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, *ms: float) -> Callable[[], None]:
        """A function whose calls take these milliseconds in turn, the last from then on."""
        turn = count()

        def run() -> None:
            self.calls.append(name)
            self.now += ms[min(next(turn), len(ms) - 1)] / 1e3

        return run


def test_spreads_are_interpolated_and_ratios_are_of_rounds() -> None:
    found = spread([float(v) for v in range(20, -1, -1)])
    assert found == Spread(1, 10, 19, 21) and found.relative == pytest.approx(1.8)
    assert spread([2.5]) == Spread(2.5, 2.5, 2.5, 1)
    with pytest.raises(ValueError, match="no values"):
        spread([])
    # The machine slows down fourfold between rounds; the ratio does not notice.
    assert ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]) == Spread(2, 2, 2, 3)
    # A ratio of medians would be 1 here.
    assert ratio([2.0, 6.0, 1.0], [1.0, 2.0, 3.0]).median == 2


def test_a_visit_leaves_out_its_first_call_unless_that_fills_it() -> None:
    clock = Clock()
    functions = {"long": clock.work("long", 500, 400), "short": clock.work("short", 90, 4)}
    samples = interleave(functions, 2, visit_ms=100, pause_s=0, clock=clock)
    assert samples["long"] == pytest.approx([500, 400])
    assert samples["short"] == pytest.approx([4, 4])
    assert clock.calls.count("long") == 2
    assert clock.calls.count("short") == 1 + 3 + 25  # 90 + 3 · 4 ≥ 100; 25 · 4 ≥ 100


def test_a_visit_records_the_median_and_no_mean() -> None:
    clock = Clock()
    work = clock.work("a", *[10.0, 10.0, 10.0, 10.0, 100.0] * 9)
    samples = interleave({"a": work}, 3, visit_ms=200.0, pause_s=0, clock=clock)
    assert samples["a"] == pytest.approx([10.0] * 3)  # the mean is 28


def test_every_round_visits_everyone_in_some_order() -> None:
    clock = Clock()
    functions = {name: clock.work(name, 100) for name in "abcd"}
    interleave(functions, 8, visit_ms=10, pause_s=0, warmup=1, clock=clock)
    assert clock.calls[:4] == list("abcd")
    rounds = [clock.calls[i : i + 4] for i in range(4, 36, 4)]
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert len({tuple(names) for names in rounds}) > 3


def test_rounds_end_when_the_time_is_up_or_they_are_told_to() -> None:
    clock = Clock()
    how = {"visit_ms": 0, "pause_s": 0}
    taken = interleave({"a": clock.work("a", 400)}, 100, seconds=1.0, clock=clock, warmup=9, **how)
    assert len(taken["a"]) == 3  # at 0, 0.4 and 0.8 s
    slow = interleave({"a": clock.work("a", 60_000)}, 100, seconds=1.0, clock=clock, **how)
    assert len(slow["a"]) == 1
    answers = [True, True, False, True]
    told = interleave({"a": lambda: None}, 9, go_on=lambda: answers.pop(0), **how)
    assert len(told["a"]) == 3
    with pytest.raises(ValueError, match="no functions"):
        interleave({})
    with pytest.raises(ValueError, match="rounds 0 is not a positive integer"):
        interleave({"a": lambda: None}, 0)


def test_the_wall_clock_sees_a_known_duration() -> None:
    samples = interleave({"sleep": lambda: time.sleep(0.02), "no": lambda: None}, 3, visit_ms=1)
    assert 20 <= min(samples["sleep"]) < 40 and min(samples["no"]) < 1


def test_cuda_samples_are_the_time_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is a clock: what lies outside the events is not counted."""
    clock = Clock()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            assert stream == "stream of cuda:1"  # and not of the current device
            self.at = clock.now

        def elapsed_time(self, end: Event) -> float:
            assert synchronized
            return (end.at - self.at) * 1e3

    class Scratch:
        zero_ = staticmethod(clock.work("flush", 5000))

    synchronized: list[object] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronized.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    functions = [clock.work("a", 250), clock.work("b", 2000)]
    found = timing._cuda_round(functions, Scratch(), torch.device("cuda:1"))  # pyright: ignore[reportArgumentType]
    assert found == pytest.approx([250, 2000])
    # The caches are overwritten before each, for longer than a launch takes to be queued.
    assert clock.now == pytest.approx(2 * 5 * timing._FLUSHES + 2.25)


def test_a_budget_and_its_parts() -> None:
    clock = Clock()
    budget = Budget(100, clock)
    part = budget.part(0.25)
    clock.now = 20
    assert (budget.left(), part.left()) == (80, 5)
    assert budget.part(0.5).left() == 40  # of what is left now
    clock.now = 1000
    assert budget.left() == 0


def test_long_rounds_do_not_overshoot_the_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only rounds move: at most twice the seconds, but for one round."""
    now = 0.0
    monkeypatch.setattr("dit_bench.progress.time.perf_counter", lambda: now)
    for each, wanted in ((0.1, 100), (1.0, 10), (3.0, 5), (4.0, 5), (6.0, 3), (15.0, 1)):
        with Progress(quiet=True).rounds(1000, "a part", 10.0) as go_on:
            now, done = now + each, 1
            while go_on():
                now, done = now + each, done + 1
        assert abs(done - wanted) <= (each == 0.1) and each * done <= max(20.0, each), each


def test_ceilings_in_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product and every copy takes 4 ms: 2·n³ operations, each byte read and written."""

    def four_ms(functions: dict[str, Callable[[], object]], *_: object, **__: object) -> object:
        return {name: [4.0] for name, function in functions.items() if function() is not None}

    def lacking(*arguments: object) -> object:
        if arguments[1] == ceilings.FP8:
            raise RuntimeError("no kernel for fp8\nmore lines")
        return honest(*arguments)  # pyright: ignore[reportArgumentType]

    honest = ceilings.matmul
    monkeypatch.setattr(ceilings, "interleave", four_ms)
    monkeypatch.setattr(ceilings, "matmul", lacking)
    dtypes = (torch.float32, ceilings.FP8)
    found = measure_ceilings(torch.device("cpu"), size=32, copy_mib=1, dtypes=dtypes)
    assert found.matmul_tflop_s == pytest.approx({"fp32": 2 * 32**3 / 0.004 / 1e12})
    assert found.copy_gb_s == pytest.approx(2 * 2**20 / 0.004 / 1e9)
    assert found.missing == {"fp8": "no kernel for fp8"}
    one, again = Ceilings(9.0, {"a": 1, "b": 4}, 1, 1), Ceilings(8.0, {"a": 3, "b": 2}, 1, 1)
    assert one.better(again) == Ceilings(9.0, {"a": 3, "b": 4}, 1, 1)


def write(
    stat: Path, user: float, system: float, idle: float, waiting: float, stolen: float
) -> None:
    """Seconds; as the kernel writes them (proc(5)): user nice system idle iowait irq softirq steal
    guest guest_nice, of which guests are in user."""
    ticks = os.sysconf("SC_CLK_TCK")
    words = [int(ticks * s) for s in (user, 0, system, idle, waiting, 0, 0, stolen, user, 0)]
    stat.write_text(f"cpu  {' '.join(map(str, words))}\ncpu0 1 2 3 4 5 6 7 8\n", encoding="ascii")


def test_the_share_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat, wall, own = tmp_path / "stat", 0.0, 0.0
    monkeypatch.setattr(load.time, "perf_counter", lambda: wall)
    monkeypatch.setattr(OtherLoad, "_own", lambda _: own)
    write(stat, 100, 50, 1000, 7, 3)
    others, served = OtherLoad(stat), OtherLoad(stat, known=False)
    assert others.mean is None
    with (
        others.sampled(),
        served.sampled(),
    ):  # 4 s: ours 6 s on two processors, others 1 + 0.5 + 0.5
        wall, own = 4.0, 6.0
        write(stat, 100 + 6 + 1.0, 50.5, 1100, 107, 3.5)
    assert others.last == others.mean == pytest.approx(0.5) and served.mean is None
    wall = 50.0  # between two parts nothing counts
    write(stat, 300, 50.5, 1100, 107, 3.5)
    with others.sampled():  # alone for 12 s
        wall, own = 62.0, 18.0
        write(stat, 312, 50.5, 1200, 107, 3.5)
    assert others.last == pytest.approx(0.0)
    assert others.mean == pytest.approx(4 * 0.5 / 16)
    with others.sampled():  # too short to be told of alone
        wall, own = 62.5, 18.5
        write(stat, 312.75, 50.5, 1200, 107, 3.5)
    assert others.last is None and others.mean == pytest.approx((2 + 0.25) / 16.5)
    for text in ("", "cpu  0 0 0 0 0 0 0 0\n", "no numbers here\n"):
        stat.write_text(text, encoding="ascii")
        unknown = OtherLoad(stat)
        with unknown.sampled():
            wall, own = wall + 5, own + 5
        assert unknown.last is None and unknown.mean is None


def test_what_is_seen_during_a_run_counts_and_not_what_was_before() -> None:
    """0.25 processors are the limit, and half a load average where nothing was seen."""
    assert not_quoted({"other_load": 0.01, "load_average": 9.0}) is None
    assert "used 0.26 processors" in str(not_quoted({"other_load": 0.26, "load_average": 0.0}))
    for unknown in ({}, {"other_load": None}):
        assert "load average 0.60" in str(not_quoted(unknown | {"load_average": 0.6}))
        assert not_quoted(unknown | {"load_average": 0.4}) is None
        assert not_quoted(unknown | {"load_average": None}) is None
    assert "are not to be quoted" in str(warning({"other_load": 1.0}))
