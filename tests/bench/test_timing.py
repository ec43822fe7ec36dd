"""Timing, budgets, ceilings and other programs' load in closed form, with clocks of the tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import exact_float32

from dit_bench import ceilings, cli, load, timing
from dit_bench.ceilings import Ceilings, measure_ceilings
from dit_bench.load import OtherLoad, not_quoted
from dit_bench.progress import Progress
from dit_bench.speed import gpu
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
    assert spread([float(v) for v in range(20, -1, -1)]) == Spread(1, 10, 19, 21)
    assert spread([0.0, 1.0]) == Spread(0.05, 0.5, 0.95, 2)
    # A ratio of medians would be 1 here.
    assert ratio([2.0, 6.0, 1.0], [1.0, 2.0, 3.0]).median == 2


def test_a_visit_is_a_median_without_its_first_call_unless_that_fills_it() -> None:
    clock = Clock()
    functions = {
        "long": clock.work("long", 500, 400),
        "short": clock.work("short", 90, 4),
        "uneven": clock.work("uneven", *[10.0, 10.0, 10.0, 10.0, 100.0] * 9),
    }
    samples = interleave(functions, 2, visit_ms=100, pause_s=0, clock=clock)
    assert samples["long"] == pytest.approx([500, 400])
    assert samples["short"] == pytest.approx([4, 4])
    assert samples["uneven"] == pytest.approx([10, 10])  # the mean is above 20
    assert clock.calls.count("long") == 2
    assert clock.calls.count("short") == 1 + 3 + 25  # 90 + 3 · 4 ≥ 100; 25 · 4 ≥ 100


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
    answers = [True, True, False, True]
    told = interleave({"a": lambda: None}, 9, go_on=lambda: answers.pop(0), **how)
    assert len(told["a"]) == 3


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
        """Allows reads only: after a write, a sample would have to write cache lines back."""

        sum = staticmethod(clock.work("flush", 5000))

    synchronized: list[object] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronized.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    functions = [clock.work("a", 250), clock.work("b", 2000)]
    found = timing._cuda_round(functions, Scratch(), torch.device("cuda:1"))  # pyright: ignore[reportArgumentType]
    assert found == pytest.approx([250, 2000])
    # The caches are filled with it before each, for longer than a launch takes to be queued.
    assert clock.now == pytest.approx(2 * 5 * timing._FLUSHES + 2.25)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_sustained_time_is_the_mean_of_calls_without_a_pause(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of calls is estimated from the time of the first calls."""
    clock, calls = Clock(), list[float]()

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self, stream: object) -> None:
            self.at = clock.now

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) * 1e3

    def slower() -> None:
        calls.append(1.0 if len(calls) < 5 else 2.0)  # ms; the clock rate falls
        clock.now += calls[-1] / 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    assert timing.sustained(slower, torch.device(device), 0.1) == pytest.approx(2.0)
    assert len(calls) == 2 + 3 + 100


def test_budgets_and_long_rounds_keep_to_the_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    budget = Budget(100, clock)
    part = budget.part(0.25)
    clock.now = 20
    assert (budget.left(), part.left()) == (80, 5)
    assert budget.part(0.5).left() == 40  # of what is left now
    clock.now = 1000
    assert budget.left() == 0
    # Of rounds at most twice the seconds, but for one round.
    monkeypatch.setattr("dit_bench.progress.time.perf_counter", clock)
    for each, wanted in ((1.0, 10), (3.0, 5), (4.0, 5), (6.0, 3), (15.0, 1)):
        go_on, done = Progress(quiet=True).rounds(10.0), 0
        while done == 0 or go_on():
            clock.now, done = clock.now + each, done + 1
        assert done == wanted and each * done <= max(20.0, each), each


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
    dtypes = (torch.float32, torch.int8, ceilings.FP8)
    found = measure_ceilings(torch.device("cpu"), size=32, copy_mib=1, dtypes=dtypes)
    rate = 2 * 32**3 / 0.004 / 1e12
    assert found.matmul_tflop_s == pytest.approx({"fp32": rate, "int8": rate})
    assert found.copy_gb_s == pytest.approx(2 * 2**20 / 0.004 / 1e9)
    assert found.missing == {"fp8": "no kernel for fp8 more lines"}
    one, again = Ceilings(9.0, {"a": 1, "b": 4}, 1, 1), Ceilings(8.0, {"a": 3, "b": 2}, 1, 1)
    assert one.better(again) == Ceilings(9.0, {"a": 3, "b": 4}, 1, 1)


def test_the_share_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat, now = tmp_path / "stat", {"wall": 0.0, "own": 0.0}
    monkeypatch.setattr(load.time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(load.os, "times", lambda: (now["own"], 0.0, 0.0, 0.0, 0.0))

    def at(wall: float, own: float, busy: float, text: str = "") -> None:
        """proc(5): user nice system idle iowait irq softirq steal guest, guests are in user."""
        now.update(wall=wall, own=own)
        ticks = int(os.sysconf("SC_CLK_TCK") * busy)
        stat.write_text(text or f"cpu  {ticks} 0 0 {int(wall)} 7 0 0 0 {ticks} 0\n")

    at(0, 0, 100)
    others, served = OtherLoad(stat), OtherLoad(stat, known=False)
    assert others.mean is None
    with others.sampled(), served.sampled():
        at(4, 6, 108)  # ours 6 s on two processors, others 2 s
    assert others.last == others.mean == pytest.approx(0.5) and served.mean is None
    at(50, 6, 300)  # between two parts nothing counts
    with others.sampled():
        at(62, 18, 312)  # alone for 12 s
    assert others.last == pytest.approx(0.0)
    assert others.mean == pytest.approx(4 * 0.5 / 16)
    with others.sampled():
        at(62.5, 18.5, 312.75)  # too short to be told of alone
    assert others.last is None and others.mean == pytest.approx((2 + 0.25) / 16.5)
    for text in ("cpu  0 0 0 0 0 0 0 0\n", "no numbers here\n"):
        at(0, 0, 0, text)
        unknown = OtherLoad(stat)
        with unknown.sampled():
            at(5, 5, 0, text)
        assert unknown.last is None and unknown.mean is None


def test_what_is_seen_during_a_run_counts_and_not_what_was_before() -> None:
    """0.25 processors are the limit, and half a load average where nothing was seen."""
    assert not_quoted({"other_load": 0.01, "load_average": 9.0}) is None
    assert "used 0.26 processors" in str(not_quoted({"other_load": 0.26, "load_average": 0.0}))
    assert "load average 0.60" in str(not_quoted({"other_load": None, "load_average": 0.6}))
    assert not_quoted({"load_average": 0.4}) is None


@pytest.mark.parametrize(
    ("words", "measures"),
    [
        (["--model", "S/8", "--device", "cpu"], "dit_bench.models_command.measure"),
        (["operators", "--device", "cpu"], "dit_bench.speed.operators.measure_ceilings"),
        (["gpu", "--sizes", "none"], "dit_bench.speed.gpu.sustained_ceilings"),
        (["parity", "--model", "builtin"], "dit_bench.quality.parity.try_step"),
    ],
)
def test_no_command_measures_in_tf32(
    words: list[str], measures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """References would have only TF32's 10 bits of mantissa. Afterwards torch's settings are
    restored."""
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    seen: list[bool] = []

    def measure(*_: object, **__: object) -> None:
        seen.extend(switch.allow_tf32 for switch in switches)
        raise ValueError("no need to go on")

    monkeypatch.setattr(gpu, "cuda_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(measures, measure)
    with exact_float32():  # which restores them
        for switch in switches:
            switch.allow_tf32 = True
        assert cli.main(words) == 2
        assert seen == [False, False]
        assert all(switch.allow_tf32 for switch in switches)
