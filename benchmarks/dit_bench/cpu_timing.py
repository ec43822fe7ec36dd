"""Timing by visits, for functions of a CPU that own thread pools and caches.

`dit_bench.timing.interleave` calls each function once a round. Here a function is visited: threads
of the one before have gone to sleep, and a short function is called until it meets the caches as
it leaves them, which is how the steps of a sampler follow each other.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping

from dit_bench.timing import Interleaved

VISIT_MS = 100.0  # least time spent on one function in one round
PAUSE_S = 0.02  # threads that spin while they wait for work have gone to sleep by then


def interleave_visits(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    visit_ms: float = VISIT_MS,
    pause_s: float = PAUSE_S,
    go_on: Callable[[], bool] = lambda: True,
    clock: Callable[[], float] = time.perf_counter,
) -> Interleaved:
    """Milliseconds of one call of each function, one sample a round.

    Each round visits the functions in another order. A visit calls until ``visit_ms`` have passed
    and records the median, without the first call unless that fills the visit by itself. ``go_on``
    is asked before every round but the first: none follows where it says no.

    Raises ValueError where ``rounds`` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds {rounds} is not a positive integer")
    samples: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    shuffle = random.Random(0).shuffle
    for i in range(rounds):
        if i > 0 and not go_on():
            break
        shuffle(order)
        for name in order:
            time.sleep(pause_s)
            samples[name].append(_visit(functions[name], visit_ms, clock))
    return Interleaved(samples)


def _visit(function: Callable[[], object], visit_ms: float, clock: Callable[[], float]) -> float:
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
