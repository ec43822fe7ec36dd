"""Timing of alternatives side by side, on the CPU by the wall clock and on CUDA by events.

In every round each function is visited once, in another order each time, so that a change of clock
or load affects all of them. A ratio is taken within a round, in which both sides had the same
conditions; the ratios are then summarised.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

Function = Callable[[], object]
Key = TypeVar("Key")

VISIT_MS = 100.0
"""The least time that is spent on one function in one round."""
PAUSE_S = 0.02
"""Threads that spin while they wait for work have gone to sleep by then."""
_FLUSH_FLOATS = 2**26
_FLUSHES = 8
"""256 MiB, several times any L2 cache, are read this number of times before every CUDA sample.
Writing them would leave cache lines that the sample must write back. The reads also keep the device
busy, for about 0.5 ms at 4 TB/s, while the host queues the launches of the sample: otherwise the
time that Python takes to start a kernel of a few microseconds would be measured, which is up to
0.2 ms with the descriptors of a product or the guards of torch.compile."""


class Budget:
    """A number of seconds from now on. Work is not begun without time for it; begun work is
    not cut short: after torch.compile, an exception in a signal handler crashes CPython 3.11.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    def left(self) -> float:
        """Seconds left, 0 if none."""
        return max(0.0, self._end - self._clock())

    def part(self, share: float) -> Budget:
        """A budget that ends when ``share`` (0 … 1) of what is left now has passed."""
        return Budget(share * self.left(), self._clock)


@dataclass(frozen=True)
class Spread:
    """The 5 %, 50 % and 95 % quantiles of ``n`` values, linearly interpolated."""

    p5: float
    median: float
    p95: float
    n: int


def spread(values: Sequence[float]) -> Spread:
    """The spread of these values. Raises IndexError if there are none."""
    p5, median, p95 = np.quantile(values, (0.05, 0.5, 0.95)).tolist()
    return Spread(p5, median, p95, len(values))


def ratio(one: Sequence[float], other: Sequence[float]) -> Spread:
    """The spread of ``one``'s times over ``other``'s, each taken within its round."""
    return spread([a / b for a, b in zip(one, other, strict=True)])


def interleave(
    functions: Mapping[Key, Function],
    rounds: int = 20,
    *,
    device: torch.device | str = "cpu",
    visit_ms: float = VISIT_MS,
    pause_s: float = PAUSE_S,
    warmup: int = 0,
    seconds: float | None = None,
    go_on: Callable[[], bool] = lambda: True,
    clock: Callable[[], float] = time.perf_counter,
    visit: Callable[[Key], float] | None = None,
) -> dict[Key, list[float]]:
    """Milliseconds of one call of each function: one sample per round, in the rounds' order.

    A visit on the CPU calls until ``visit_ms`` have passed and records the median. The first call
    is left out unless it fills the visit alone; with 0 there is only one call. A short function
    thus finds the caches as its own last call left them, as the steps of a sampler do.
    A sample on CUDA is the device's time between two events around one call, with cold caches.

    Args:
        rounds: the largest number of rounds.
        warmup: calls of each before the first round.
        seconds: no new round begins after this time (without warm-up); the first always runs.
        go_on: called before every round except the first; False ends the measurement.
        clock: seconds, for CPU samples and for ``seconds``.
        visit: name → milliseconds, in place of the CPU's visit that is described above.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    for function in functions.values():
        for _ in range(warmup):
            function()
    scratch = torch.zeros(_FLUSH_FLOATS if cuda else 0, device=device)
    if cuda:
        torch.cuda.synchronize(device)
    samples: dict[Key, list[float]] = {name: [] for name in functions}
    order, shuffle, start = list(functions), random.Random(0).shuffle, clock()
    for i in range(rounds):
        if i > 0 and ((seconds is not None and clock() - start >= seconds) or not go_on()):
            break
        shuffle(order)
        if cuda:
            taken = _cuda_round([functions[name] for name in order], scratch, device)
            for name, ms in zip(order, taken, strict=True):
                samples[name].append(ms)
            continue
        for name in order:
            time.sleep(pause_s)
            ms = visit(name) if visit else _visit(functions[name], visit_ms, clock)
            samples[name].append(ms)
    return samples


def _visit(function: Function, visit_ms: float, clock: Callable[[], float]) -> float:
    def call_ms() -> float:
        start = clock()
        function()
        return (clock() - start) * 1e3

    first = spent = call_ms()
    recorded: list[float] = []
    while spent < visit_ms:
        recorded.append(call_ms())
        spent += recorded[-1]
    return statistics.median(recorded) if recorded else first


def sustained(function: Function, device: torch.device, seconds: float) -> float:
    """Mean milliseconds of a call, over calls without a pause for about ``seconds``. Clocks and
    power settle meanwhile. Caches are warm, because nothing else runs between the calls."""

    def mean(count: int) -> float:
        if device.type != "cuda":
            start = time.perf_counter()
            for _ in range(count):
                function()
            return (time.perf_counter() - start) * 1e3 / count
        stream = torch.cuda.current_stream(device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        for _ in range(count):
            function()
        end.record(stream)
        end.synchronize()
        return begin.elapsed_time(end) / count

    mean(2)  # the first calls load libraries and kernels
    return mean(max(1, int(1e3 * seconds / max(mean(3), 1e-3))))


def _cuda_round(
    functions: Sequence[Function], scratch: torch.Tensor, device: torch.device
) -> list[float]:
    marks = []
    stream = torch.cuda.current_stream(device)  # ``device`` need not be the current one
    for function in functions:
        for _ in range(_FLUSHES):
            scratch.sum()
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        function()
        end.record(stream)
        marks.append((begin, end))
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in marks]
