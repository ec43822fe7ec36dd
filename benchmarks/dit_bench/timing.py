"""Timing of alternatives side by side, on the CPU by the wall clock and on CUDA by events.

Alternatives take turns, so that a change of clock or of load meets all of them; a ratio is taken
within a round, where both sides had the same conditions, and only then summarised.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Function = Callable[[], object]

_FLUSH_FLOATS = 2**26
_FLUSHES = 4
"""256 MiB, several times any L2, written so often before every CUDA sample. It is also work for the
device, some 0.25 ms at 4 TB/s, while the host queues the sample's launches: a sample must not
measure how long Python takes to start a kernel that runs for microseconds."""


@dataclass(frozen=True)
class Quantiles:
    """The 10 %, 50 % and 90 % quantiles, linearly interpolated."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Spread:
    """The 5 %, 50 % and 95 % quantiles of ``n`` values, linearly interpolated."""

    p5: float
    median: float
    p95: float
    n: int

    @property
    def relative(self) -> float:
        """(p95 − p5) / median."""
        return (self.p95 - self.p5) / self.median


@dataclass(frozen=True)
class Interleaved:
    """Samples of several functions, one of each a round.

    samples_ms: name → milliseconds, entry i from round i.
    """

    samples_ms: Mapping[str, Sequence[float]]

    @property
    def rounds(self) -> int:
        return len(next(iter(self.samples_ms.values())))

    def ms(self, name: str) -> Quantiles:
        return quantiles(self.samples_ms[name])

    def ratio(self, name: str, to: str) -> Quantiles:
        """Quantiles of the rounds' own ratios, ``name``'s time over ``to``'s."""
        return quantiles(self._ratios(name, to))

    def spread(self, name: str) -> Spread:
        return spread(self.samples_ms[name])

    def ratio_spread(self, name: str, to: str) -> Spread:
        """As `ratio`, from 5 % to 95 %."""
        return spread(self._ratios(name, to))

    def _ratios(self, name: str, to: str) -> list[float]:
        pairs = zip(self.samples_ms[name], self.samples_ms[to], strict=True)
        return [a / b for a, b in pairs]


def quantiles(values: Sequence[float]) -> Quantiles:
    """Raises ValueError for no values."""
    return Quantiles(*_at(values, 0.1, 0.5, 0.9))


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError for no values."""
    p5, median, p95 = _at(values, 0.05, 0.5, 0.95)
    return Spread(p5, median, p95, len(values))


def _at(values: Sequence[float], *points: float) -> list[float]:
    if not values:
        raise ValueError("quantiles of no values: at least one is needed")
    found = torch.tensor(values, dtype=torch.float64)
    return found.quantile(torch.tensor(points, dtype=torch.float64)).tolist()


def interleave(
    functions: Mapping[str, Function],
    rounds: int = 20,
    *,
    device: torch.device | str = "cpu",
    warmup: int = 1,
    seconds: float | None = None,
    go_on: Callable[[], bool] = lambda: True,
    clock: Callable[[], float] = time.perf_counter,
) -> Interleaved:
    """Time every function once a round, in an order that rotates from round to round.

    On CUDA the caches are overwritten before every sample, and a sample is the device's time
    between two events around the call.

    Args:
        functions: name → function of no arguments.
        rounds: at most so many.
        warmup: calls of each before the first round.
        seconds: no new round begins after so long, warm-up not counted; the first always runs.
        go_on: asked before every round but the first: none follows where it says no.
        clock: seconds, for CPU samples and for ``seconds``.

    Raises:
        ValueError: no functions, or less than one round.
    """
    if not functions:
        raise ValueError("no functions to time: at least one is needed")
    if rounds < 1:
        raise ValueError(f"rounds {rounds} is not a positive integer")
    device = torch.device(device)
    names = list(functions)
    for name in names:
        for _ in range(warmup):
            functions[name]()
    scratch = torch.empty(_FLUSH_FLOATS if device.type == "cuda" else 0, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = clock()
    for i in range(rounds):
        if i > 0 and seconds is not None and clock() - start >= seconds:
            break
        if i > 0 and not go_on():
            break
        turn = names[i % len(names) :] + names[: i % len(names)]
        if device.type == "cuda":
            taken = _cuda_round([functions[name] for name in turn], scratch, device)
        else:
            taken = [_cpu_sample(functions[name], clock) for name in turn]
        for name, ms in zip(turn, taken, strict=True):
            samples[name].append(ms)
    return Interleaved(samples)


def _cpu_sample(function: Function, clock: Callable[[], float]) -> float:
    start = clock()
    function()
    return (clock() - start) * 1e3


def _cuda_round(
    functions: Sequence[Function], scratch: torch.Tensor, device: torch.device
) -> list[float]:
    marks = []
    stream = torch.cuda.current_stream(device)  # ``device`` need not be the current one
    for function in functions:
        for _ in range(_FLUSHES):
            scratch.zero_()
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        function()
        end.record(stream)
        marks.append((begin, end))
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in marks]
