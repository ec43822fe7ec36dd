"""The choice between functions that compute the same, with made-up candidates and clocks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import random
from torch import Tensor

from dit_kernels import chooser
from dit_kernels.chooser import BUDGET_S, ROUNDS, VARIABLE, Chooser, Times, quickest, worst_row

KEY = "fc1 2x256x1152 to 4608, bfloat16"
RIGHT = random(4, 64, dtype=torch.bfloat16)


class Bench:
    """A chooser whose candidates take the milliseconds that the test sets."""

    def __init__(self, **ms: float | list[float]) -> None:
        self.now, self.ms = 0.0, {name: list(self.each(value)) for name, value in ms.items()}
        self.memory: dict[str, Times] = {}
        self.calls: list[str] = []
        self.sampled: list[str] = []
        self.results: dict[str, Callable[[], Any]] = {}
        self.chooser = Chooser(
            self.memory.get, self.memory.__setitem__, self.sample, lambda: self.now
        )

    @staticmethod
    def each(value: float | list[float]) -> Iterator[float]:
        yield from (value if isinstance(value, list) else [value] * ROUNDS[1])

    def sample(self, run: Callable[[], object]) -> float:
        run()
        name = self.calls[-1]
        self.sampled.append(name)
        self.now += self.ms[name][0] * 1e-3
        return self.ms[name].pop(0)

    def choose(self, **options: Any) -> str:
        def call(name: str) -> Any:
            self.calls.append(name)
            return self.results.get(name, lambda: RIGHT)()

        runs = {name: lambda n=name: call(n) for name in self.ms}
        return self.chooser.choose(KEY, runs, **options)


def refused(bench: Bench, name: str, reason: str) -> None:
    """``name`` is dropped with one warning, of one line, and the default is kept."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert bench.choose() == "library"
    (message,) = (str(each.message) for each in told)
    assert message.startswith(f"{name} is not used for {KEY}: {reason}") and "\n" not in message
    assert bench.memory[KEY][name] is None
    assert bench.choose() == "library"  # remembered, without another warning


def test_the_quickest_is_chosen_by_medians_of_interleaved_rounds() -> None:
    quick = ROUNDS[1] // 2 - 1
    slow = [0.1] * quick + [9.0] * (ROUNDS[1] - quick)  # quick at times only
    bench = Bench(library=1.0, tall=slow, wide=0.9, square=0.95)
    assert bench.choose() == "wide"
    assert bench.memory == {KEY: {"library": 1.0, "tall": 9.0, "wide": 0.9, "square": 0.95}}
    count = len(bench.ms)
    assert len(bench.sampled) == count * ROUNDS[1]
    rounds = [bench.sampled[i : i + count] for i in range(0, len(bench.sampled), count)]
    assert all(sorted(each) == sorted(bench.ms) for each in rounds)
    assert {each[0] for each in rounds} == set(bench.ms)  # none always comes first
    calls = len(bench.calls)
    assert bench.choose() == "wide" and len(bench.calls) == calls  # remembered


@pytest.mark.parametrize(("ms", "name"), [(0.981, "library"), (0.979, "own")])
def test_less_than_two_percent_keeps_the_default(ms: float, name: str) -> None:
    assert Bench(library=1.0, own=ms).choose() == name
    assert quickest({"library": 1.0, "own": ms}) == name


def test_a_budget_ends_the_rounds_after_the_fewest() -> None:
    for ms, rounds in ((1e3 * BUDGET_S, ROUNDS[0]), (1e3 * BUDGET_S / 11, 6), (0.1, ROUNDS[1])):
        bench = Bench(library=ms, own=ms)
        bench.choose()
        assert len(bench.sampled) == 2 * rounds


def broken() -> Tensor:
    raise RuntimeError("out of resource:\n shared memory")


NAN, ROW = RIGHT.clone(), RIGHT.clone()
NAN[3, 5] = math.nan
ROW[2] *= 1.03  # more than rounding; over all four rows it would be half of that, and pass
WRONG: list[tuple[Callable[[], Any], str]] = [
    (broken, "out of resource: shared memory"),
    (lambda: NAN, "a row of its result has error nan, allowed is 0.016"),
    (lambda: ROW, "a row of its result has error 0.026"),
    (lambda: RIGHT.float(), "its result is torch.float32 (4, 64), not torch.bfloat16 (4, 64)"),
    (lambda: RIGHT[:1], "its result is torch.bfloat16 (1, 64), not"),
    (lambda: (RIGHT, RIGHT), "zip() argument"),
]


@pytest.mark.parametrize(("wrong", "reason"), WRONG)
def test_a_candidate_that_raises_or_is_wrong_is_dropped(
    wrong: Callable[[], Any], reason: str
) -> None:
    bench = Bench(library=1.0, own=0.1)
    bench.results["own"] = wrong
    refused(bench, "own", reason)


def test_a_candidate_that_raises_while_it_is_timed_is_dropped() -> None:
    bench = Bench(library=1.0, own=0.1)
    results = iter([lambda: RIGHT, lambda: RIGHT])  # the check and the first round
    bench.results["own"] = lambda: next(results, broken)()
    refused(bench, "own", "out of resource")


def test_every_tensor_of_a_result_is_compared_after_preparation() -> None:
    """The candidates work in place, as the end of a branch does, so ``prepare`` must reset x."""
    x = torch.zeros(2, 8)

    def add(step: float, last: float) -> tuple[Tensor, Tensor]:
        return x.add_(step), torch.full((2, 8), last)

    bench = Bench(library=1.0, own=0.5, first=0.1, last=0.1)
    bench.results |= {"library": lambda: add(1.0, 2.0), "own": lambda: add(1.0, 2.0)}
    bench.results |= {"first": lambda: add(3.0, 2.0), "last": lambda: add(1.0, 3.0)}
    with (
        pytest.warns(
            UserWarning, match="^first is not used for .* a row of its result has error 2"
        ),
        pytest.warns(
            UserWarning, match="^last is not used for .* a row of its result has error 0.5"
        ),
    ):
        assert bench.choose(prepare=x.zero_) == "own"


def test_errors_of_the_default_and_out_of_memory_are_raised() -> None:
    for name, error in (("library", RuntimeError), ("own", torch.OutOfMemoryError)):
        bench = Bench(library=1.0, own=0.1)

        def fail(error: type[RuntimeError] = error) -> Tensor:
            raise error("no")

        bench.results[name] = fail
        with pytest.raises(error):
            bench.choose()
        assert bench.memory == {}


def test_the_errors_of_rows() -> None:
    wanted = torch.tensor([[3.0, 4.0], [0.0, 0.0], [30.0, 40.0]])
    found = wanted + torch.tensor([[0.0, 0.5], [0.0, 0.0], [0.3, 0.4]])
    assert worst_row(found, wanted) == pytest.approx(0.5 / (2525 / 3) ** 0.5)
    assert worst_row(10 * wanted, wanted) == pytest.approx(9)
    assert math.isnan(worst_row(found * math.nan, wanted))
    assert worst_row(0 * wanted, 0 * wanted) == 0 and worst_row(wanted, 0 * wanted) > 1


@pytest.mark.parametrize("stale", [{"library": 1.0, "tall": 0.2}, {"own": 0.1, "library": 1.0}, {}])
def test_other_candidates_are_measured_again(stale: Times) -> None:
    bench = Bench(library=1.0, own=0.5)
    bench.memory[KEY] = stale
    with pytest.warns(
        UserWarning, match=f"^{KEY}: the candidates have changed; they are measured again"
    ):
        assert bench.choose() == "own"
    assert bench.memory == {KEY: {"library": 1.0, "own": 0.5}}


def test_nothing_is_called_if_choosing_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    bench = Bench(library=1.0, own=0.5)
    bench.memory[KEY] = {"library": 1.0, "own": 0.5}
    assert bench.choose() == "library" and not bench.calls
    monkeypatch.setenv(VARIABLE, "1")
    assert Bench(library=1.0, own=0.5).choose() == "own"
    monkeypatch.setenv(VARIABLE, "yes")
    with pytest.raises(ValueError, match=r"^DIT_KERNELS_CHOOSE='yes': choose 0 .* or 1"):
        Bench()


def test_one_candidate_needs_no_measurement() -> None:
    bench = Bench(library=1.0)
    assert bench.choose() == "library" and not bench.calls and bench.memory == {}


def test_a_sample_on_cuda_begins_with_cold_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the call is timed, on the device's current stream."""
    log: list[object] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            log.append(stream)

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: object) -> float:
            assert isinstance(end, Event) and end is not self
            return 0.25

    flush = torch.Tensor.max
    monkeypatch.setattr(torch.Tensor, "max", lambda x: log.append("read") or flush(x))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(chooser, "_FLUSH_BYTES", 64)
    sample = chooser.cuda_sample(torch.device("cpu"))
    assert sample(lambda: log.append("call")) == 0.25
    stream = "stream of cpu"
    assert log == [*["read"] * chooser._FLUSHES, stream, "call", stream, "wait"]
