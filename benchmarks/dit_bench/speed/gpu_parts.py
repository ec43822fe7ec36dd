"""Runs the parts of a GPU run one by one. After an error, only the rows of its part are missing.

After an illegal memory access a process can no longer use the device, and a call that waits for a
hung kernel does not return. The program then restarts itself with its results so far. From then on
it chooses no kernels by measurement, because a candidate may have caused the failure.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from dit_bench.contenders import failed
from dit_bench.machine import DeviceState, usable
from dit_bench.report import Report, Row, partial_path, write_partial
from dit_bench.speed import gpu_check
from dit_bench.speed.latency import Timer
from dit_bench.timing import Budget
from dit_engine.console.output import STDOUT
from dit_engine.errors import BackendUnavailable
from dit_engine.io.printable import one_line
from dit_kernels import Unavailable
from dit_kernels.chooser import VARIABLE, choosing

START_SECONDS, RESERVE_SECONDS = 15.0, 10.0
"""Kept back: START for the imports before the clock starts, RESERVE for the table at the end."""
PART_SECONDS, PART_SHARE = 90.0, 0.3
"""A part that takes longer than both this time and this share of the whole time counts as hung."""

OURS = {"dit_engine", "dit_kernels", "dit_bench"}
"""The packages of this repository that run in a GPU run."""

Part = tuple[str, Callable[[Timer], object]]
"""A part of the run: its name, and the function that adds its rows to the report."""
Group = tuple[float, Sequence[Part]]
"""A share and parts: the parts may use this share of the time that is left when they begin."""


def take(
    all_groups: Sequence[Group], timer: Timer, report: Report, budget: Budget,
    keep: Callable[[], object], restart: Callable[[], object],
) -> None:  # fmt: skip
    """Run the parts that are not yet in the report, and call ``keep`` after each of them.

    ``restart`` is called if the device is lost, or from another thread if a part hangs. Warnings of
    our packages, such as that a kernel is not used, become rows of the report.

    Raises KeyboardInterrupt after the part during which Ctrl-C was pressed.
    """
    state, rows, done = DeviceState(timer.device), report["rows"], report["parts_done"]
    report["machine"]["sampled_by"] = state.source
    limit = max(PART_SECONDS, PART_SHARE * budget.left())

    def end(lost: Row) -> None:
        faulthandler.dump_traceback(file=2)
        where = _standing(threading.main_thread())
        rows.append(
            lost | {"status": "failed", "reason": f"did not end in {limit:.0f} s ({where})"}
        )
        done.append(lost["case"])
        os.environ[VARIABLE] = "0"
        restart()

    with timer.progress.run(sum(len(parts) for _, parts in all_groups)):
        for share, parts in all_groups:
            timer.budget = budget.part(share)
            for name, part in parts:
                if name in done:
                    continue
                timer.progress.stage(name)
                before = len(rows)
                lost = {"section": "check", "case": name, "contender": "all", "role": "subject"}
                watch = threading.Timer(limit, end, [lost])
                watch.daemon = True
                if parts is not all_groups[-1][1]:  # after the last group nothing is left to do
                    watch.start()
                with state.sampled() as sampled, warnings.catch_warnings(record=True) as told:
                    try:
                        if timer.budget.left() <= 0:
                            raise Unavailable("no time was left")
                        part(timer)
                    except (BackendUnavailable, Unavailable) as reason:
                        rows.append(lost | {"status": "skipped", "reason": one_line(reason)[:300]})
                    except Exception as broken:  # an error loses only its own part
                        rows.append(lost | failed(broken))
                    finally:
                        watch.cancel()
                for each in told:
                    warnings.showwarning(each.message, each.category, each.filename, each.lineno)
                said = _of_ours(told)
                rows[before:before] = [
                    lost | {"contender": "a warning", "status": "skipped", "reason": one[:400]}
                    for one in said
                ]
                for row in rows[before:]:
                    row["device_state"] = sampled
                    if row["status"] in ("wrong", "failed"):  # at once: a crash prints no table
                        said_by = f"{row['case']}, {row['contender']}"
                        timer.progress.say(f"{said_by}: {row['status']}: {row['reason'][:400]}")
                done.append(name)
                keep()
                if not usable(timer.device):
                    if said and choosing():  # the part runs once more, without candidates
                        done.remove(name)
                    os.environ[VARIABLE] = "0"
                    restart()
            torch.compiler.reset()  # compiled code keeps the weights of its model alive
            gc.collect()


def _of_ours(told: Iterable[warnings.WarningMessage]) -> list[str]:
    """The texts of the warnings that come from our packages, without repetitions."""
    return list(dict.fromkeys(
        one_line(each.message) for each in told if OURS & set(Path(each.filename).parts)
    ))  # fmt: skip


def _standing(thread: threading.Thread) -> str:
    """Where a thread is in our packages: file and line of each frame, the innermost first, with the
    value of its variable ``name`` if it has one, such as the name of a candidate."""
    found, frame = list[str](), sys._current_frames().get(thread.ident or 0)
    while frame is not None and len(found) < 8:
        file, name = Path(frame.f_code.co_filename), frame.f_locals.get("name")
        if OURS & set(file.parts):
            found.append(f"{file.name}:{frame.f_lineno}" + f" {name}" * isinstance(name, str))
        frame = frame.f_back
    return ", ".join(found)


def restart(arguments: argparse.Namespace, report: Report, budget: Budget) -> None:
    """Replace this process by a new run of the program, if enough time is left."""
    minutes = (budget.left() + RESERVE_SECONDS) / 60
    if minutes < (START_SECONDS + RESERVE_SECONDS) / 60:
        return
    path = arguments.json
    if path in (None, STDOUT):
        path = Path(tempfile.mkdtemp(prefix="dit-bench-")) / "gpu.json"
    write_partial(report, path)
    gpu_check.GpuTests.end()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for each in Path("/proc/self/fd").glob("*"):  # the device too, or a kernel could hang on
        if int(each.name) > 2:
            with suppress(OSError):
                os.set_inheritable(int(each.name), False)
    os.execv(sys.executable, [
        sys.executable, "-m", "dit_bench", *arguments.given,
        "--minutes", f"{minutes:.3f}", "--resume", str(partial_path(path)),
    ])  # fmt: skip
