"""Timing, budgets and ceilings against closed forms, with clocks that tests turn."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from dit_bench import ceilings, timing
from dit_bench.budget import Budget
from dit_bench.ceilings import measure_ceilings
from dit_bench.cpu_timing import interleave_visits
from dit_bench.timing import Interleaved, Quantiles, Spread, interleave, quantiles, spread


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, *seconds: float) -> Callable[[], None]:
        """A function whose calls take these many seconds, over and over."""
        calls = 0

        def function() -> None:
            nonlocal calls
            self.now += seconds[calls % len(seconds)]
            calls += 1

        return function


def test_quantiles_are_linearly_interpolated() -> None:
    assert quantiles([float(v) for v in range(10, -1, -1)]) == Quantiles(1, 5, 9)
    pair = quantiles([3.0, 4.0])
    assert (pair.low, pair.median, pair.high) == pytest.approx((3.1, 3.5, 3.9))
    assert quantiles([2.5]) == Quantiles(2.5, 2.5, 2.5)
    with pytest.raises(ValueError, match="no values"):
        quantiles([])


def test_ratios_are_of_pairs() -> None:
    """The machine slows down fourfold between rounds; the ratio does not notice."""
    taken = Interleaved({"a": [1.0, 2.0, 4.0], "b": [2.0, 4.0, 8.0]})
    assert taken.rounds == 3
    assert taken.ms("b") == quantiles([2, 4, 8])
    assert taken.ratio("b", "a") == Quantiles(2, 2, 2)
    assert taken.ratio("a", "b") == Quantiles(0.5, 0.5, 0.5)
    # A ratio of medians would be 1 here.
    uneven = Interleaved({"a": [1.0, 2.0, 3.0], "b": [2.0, 6.0, 1.0]})
    assert uneven.ratio("b", "a").median == 2


def test_spreads_reach_from_5_to_95_percent() -> None:
    found = spread([float(v) for v in range(20, -1, -1)])
    assert found == Spread(1, 10, 19, 21) and found.relative == pytest.approx(1.8)
    taken = Interleaved({"a": [1.0, 2.0, 4.0], "b": [2.0, 4.0, 8.0]})
    assert taken.spread("a") == spread([1, 2, 4])
    assert taken.ratio_spread("b", "a") == Spread(2, 2, 2, 3)
    with pytest.raises(ValueError, match="no values"):
        spread([])


def test_the_wall_clock_sees_a_known_duration() -> None:
    """Sleeping 20 ms takes at least that, and not long more at best."""
    functions = {"sleep": lambda: time.sleep(0.02), "nothing": lambda: None}
    for taken in (interleave(functions, 5), interleave_visits(functions, 5, visit_ms=1)):
        assert 20 <= min(taken.samples_ms["sleep"]) < 40
        assert taken.spread("nothing").p5 < 1


def test_rounds_end_when_they_are_told_to() -> None:
    answers = [True, True, False, True]
    functions = {"a": lambda: None, "b": lambda: None}
    assert interleave(functions, 9, go_on=lambda: answers.pop(0)).rounds == 3
    answers = [True, False]
    assert interleave_visits(functions, 9, visit_ms=0, go_on=lambda: answers.pop(0)).rounds == 2


def test_samples_are_milliseconds_of_each_function_alone() -> None:
    clock = Clock()
    functions = {"a": clock.work(0.001, 0.002), "b": clock.work(0.5)}
    taken = interleave(functions, 4, warmup=0, clock=clock)
    assert taken.samples_ms["a"] == pytest.approx([1, 2, 1, 2])
    assert taken.samples_ms["b"] == pytest.approx([500] * 4)


def test_functions_take_turns_in_a_rotating_order() -> None:
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    interleave(functions, 4, warmup=2)
    assert "".join(calls) == "aabbcc" + "abc" + "bca" + "cab" + "abc"


def test_no_round_begins_after_the_time_is_up() -> None:
    clock = Clock()
    taken = interleave({"a": clock.work(0.4)}, 100, seconds=1.0, clock=clock, warmup=9)
    assert taken.rounds == 3  # at 0, 0.4 and 0.8 s
    slow = interleave({"a": clock.work(60.0)}, 100, seconds=1.0, clock=clock)
    assert slow.rounds == 1


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
        zero_ = staticmethod(clock.work(5.0))

    synchronized: list[object] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronized.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    functions = [clock.work(0.25), clock.work(2.0)]
    assert timing._cuda_round(functions, Scratch(), torch.device("cuda:1")) == [250, 2000]
    # The caches are overwritten before each, for longer than a launch takes to be queued.
    assert clock.now == 2 * 5 * timing._FLUSHES + 0.25 + 2


def test_timing_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no functions"):
        interleave({})
    with pytest.raises(ValueError, match="rounds 0"):
        interleave({"a": lambda: None}, 0)


def test_a_budget_and_its_parts() -> None:
    clock = Clock()
    budget = Budget(100, clock)
    part = budget.part(0.25)
    assert (budget.left(), part.left()) == (100, 25)
    clock.now = 20
    assert (budget.left(), part.left()) == (80, 5)
    assert budget.part(0.5).left() == 40  # of what is left now
    clock.now = 1000
    assert budget.left() == 0


def test_ceilings_in_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product and every copy takes 4 ms: 2·n³ operations, each byte read and written."""

    def four_ms(functions: dict[str, Callable[[], object]], *_: object, **__: object) -> object:
        for function in functions.values():
            function()
        return Interleaved({name: [4.0] for name in functions})

    monkeypatch.setattr(ceilings, "interleave", four_ms)
    found = measure_ceilings(torch.device("cpu"), size=32, copy_mib=1, dtypes=(torch.float32,))
    assert found.matmul_tflop_s == pytest.approx({"fp32": 2 * 32**3 / 0.004 / 1e12})
    assert found.copy_gb_s == pytest.approx(2 * 2**20 / 0.004 / 1e9)
    assert found.missing == {}


def test_a_dtype_that_the_device_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: object) -> object:
        raise RuntimeError("no kernel for fp8\nmore lines")

    monkeypatch.setattr(ceilings, "matmul", lacking)
    found = measure_ceilings(torch.device("cpu"), size=8, copy_mib=1, dtypes=(ceilings.FP8,))
    assert found.missing == {"fp8": "no kernel for fp8"} and found.matmul_tflop_s == {}
    assert found.copy_gb_s > 0


def test_what_is_told_is_the_median_and_no_mean() -> None:
    """One call in five takes ten times as long, as where another program has had its turn."""
    clock = Clock()
    work = clock.work(0.010, 0.010, 0.010, 0.010, 0.100)
    times = interleave({"a": work}, 10, warmup=0, clock=clock)
    assert times.spread("a").median == times.ms("a").median == pytest.approx(10.0)  # mean: 28
    assert times.ratio("a", "a").median == 1.0
    skewed = Interleaved({"a": [1.0, 2.0, 30.0], "b": [1.0, 1.0, 1.0]})
    assert skewed.ratio_spread("a", "b").median == 2.0
    visits = interleave_visits(
        {"a": clock.work(0.010, 0.010, 0.010, 0.010, 0.100)}, 3, visit_ms=200.0, pause_s=0,
        clock=clock,
    )  # fmt: skip
    assert visits.samples_ms["a"] == pytest.approx([10.0] * 3)
