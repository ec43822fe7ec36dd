"""The forward beside other programs: the same functions on an idle machine and on a shared one.

Every round visits each function twice, once while the neighbours are stopped and once while each of
them keeps a processor busy. A visit records the mean of its calls, because a median would leave out
the few calls that wait for a slice of the system's time.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dit_bench.cpu_forward import Forward, forward_peers
from dit_bench.cpu_sections import Log, Section, Settings, model_of
from dit_bench.peers import build_peers

WORKLOADS = (("builtin", 2), ("builtin", 16), ("S/2", 2))
PEERS = ("lean bf16", "lean int8", "openvino bf16", "diffusers bf16")
VISIT_MS = 300.0
PAUSE_S = 0.05
# It ends with the program that started it, however that ends.
_NEIGHBOUR = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): sum(range(10000))"


class Neighbours:
    """``count`` programs of one thread each, which work only inside `working`."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._programs: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Neighbours:
        try:
            for _ in range(self._count):
                command = [sys.executable, "-I", "-c", _NEIGHBOUR, str(os.getpid())]
                self._programs.append(subprocess.Popen(command))
            self._send(signal.SIGSTOP)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for program in self._programs:
            program.kill()
            program.wait()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Raises RuntimeError if one of them has ended."""
        self._send(signal.SIGCONT)
        try:
            time.sleep(PAUSE_S)
            yield
            if any(program.poll() is not None for program in self._programs):
                raise RuntimeError("a busy neighbour ended before the measurement did")
        finally:
            self._send(signal.SIGSTOP)

    def _send(self, number: int) -> None:
        for program in self._programs:
            program.send_signal(number)


def run_busy(name: str, batch: int, count: int, settings: Settings, log: Log) -> Section:
    """Build, check and time the forward of ``name``, idle and beside ``count`` busy programs."""
    workload = f"{name}, batch {batch}"
    log(f"{workload}: building")
    forward = Forward(model_of(name), batch, settings.threads)
    peers = [peer for peer in forward_peers(forward, ()) if peer.name in PEERS]
    expected = forward.expected()
    built = build_peers(peers, expected, forward.bf16_error(expected), log)
    log(f"{workload}: {settings.rounds} rounds of {len(built.functions)}, idle and busy")
    with Neighbours(count) as neighbours:
        samples = interleave_busy(built.functions, settings.rounds, neighbours)
    return {
        "workload": workload,
        "neighbours": count,
        "peers": built.records,
        "samples_ms": samples,
        "busy": [busy_row(name, samples[name]) for name in PEERS if name in samples],
    }


def interleave_busy(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    neighbours: Neighbours,
    visit_ms: float = VISIT_MS,
) -> dict[str, dict[str, list[float]]]:
    """Function → "idle" and "busy" → the mean milliseconds of a call in each round."""
    samples: dict[str, dict[str, list[float]]] = {n: {"idle": [], "busy": []} for n in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            time.sleep(PAUSE_S)  # threads of the function before go to sleep
            samples[name]["idle"].append(_visit(function, visit_ms))
            with neighbours.working():
                samples[name]["busy"].append(_visit(function, visit_ms))
    return samples


def busy_row(name: str, samples: Mapping[str, list[float]]) -> dict[str, Any]:
    """Medians over the rounds in milliseconds, and the median of each round's busy ÷ idle."""
    ratios = [busy / idle for idle, busy in zip(samples["idle"], samples["busy"], strict=True)]
    return {
        "who": name,
        "idle_ms": statistics.median(samples["idle"]),
        "busy_ms": statistics.median(samples["busy"]),
        "ratio": statistics.median(ratios),
    }


def format_busy(section: Mapping[str, Any]) -> str:
    """A section as text, one line each."""
    lines = ["", f"{section['workload']}, {section['neighbours']} busy neighbours",
             f"  {'':<15} {'idle ms':>9} {'busy ms':>9} {'busy ÷ idle':>12}"]  # fmt: skip
    lines += [
        f"  {row['who']:<15} {row['idle_ms']:>9.2f} {row['busy_ms']:>9.2f} {row['ratio']:>12.2f}"
        for row in section["busy"]
    ]
    return "\n".join(lines)


def _visit(function: Callable[[], object], visit_ms: float) -> float:
    function()  # meets the caches as the function before left them
    start, calls, spent = time.perf_counter(), 0, 0.0
    while spent < visit_ms:
        function()
        calls += 1
        spent = (time.perf_counter() - start) * 1e3
    return spent / calls
