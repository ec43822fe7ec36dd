"""The forward beside other programs: the same functions on an idle and on a busy machine.

Every round visits each function twice, once while the neighbours are stopped and once while each of
them keeps a processor busy. A visit records the mean of its calls, because a median would leave out
the few calls that wait for a slice of the system's time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from dit_bench.report import Row
from dit_bench.speed.latency import quantiles
from dit_bench.timing import PAUSE_S, interleave, ratio, spread

VISIT_MS = 300.0
# It ends when the program that started it ends, for whatever reason.
_NEIGHBOUR = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): sum(range(10000))"
Programs = Sequence[subprocess.Popen[bytes]]


@contextmanager
def neighbours(count: int) -> Iterator[Programs]:
    """``count`` programs of one thread each, which work only inside `working`."""
    programs: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            command = [sys.executable, "-I", "-c", _NEIGHBOUR, str(os.getpid())]
            programs.append(subprocess.Popen(command))
            programs[-1].send_signal(signal.SIGSTOP)
        yield programs
    finally:
        for program in programs:
            program.kill()
            program.wait()


@contextmanager
def working(programs: Programs) -> Iterator[None]:
    """In this block the programs work. Raises RuntimeError if one of them has ended."""
    for program in programs:
        program.send_signal(signal.SIGCONT)
    try:
        time.sleep(PAUSE_S)
        yield
        if any(program.poll() is not None for program in programs):
            raise RuntimeError("a busy neighbour ended before the measurement did")
    finally:
        for program in programs:
            program.send_signal(signal.SIGSTOP)


def busy_rows(
    case: str,
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    count: int,
    visit_ms: float = VISIT_MS,
) -> list[Row]:
    """A row for each function, timed idle and beside ``count`` busy programs: medians over the
    rounds, and the quantiles of each round's busy time over its idle time."""
    both = {
        (name, busy): function for name, function in functions.items() for busy in (False, True)
    }
    with neighbours(count) as programs:

        def visit(key: tuple[str, bool]) -> float:
            with working(programs if key[1] else ()):
                return _mean_ms(both[key], visit_ms)

        samples = interleave(both, rounds, visit=visit)
    rows = []
    for name in functions:
        idle, busy = samples[name, False], samples[name, True]
        rows.append({
            "section": "busy", "case": case, "contender": name, "status": "ok",
            "neighbours": count, "idle_ms": spread(idle).median, "busy_ms": spread(busy).median,
            "ratio": quantiles(ratio(busy, idle)),
        })  # fmt: skip
    return rows


def _mean_ms(function: Callable[[], object], visit_ms: float) -> float:
    function()  # not counted: the caches hold the previous function's data
    start, calls, spent = time.perf_counter(), 0, 0.0
    while spent < visit_ms:
        function()
        calls += 1
        spent = (time.perf_counter() - start) * 1e3
    return spent / calls
