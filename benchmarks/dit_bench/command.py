"""A run of any command, and the writing of its report.

An exception that ends a run early is raised after everything that was finished is written.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from dit_bench.load import withdraw_verdicts
from dit_bench.progress import Progress
from dit_bench.report import Report, partial_path, validate, write, write_partial
from dit_engine.console.output import STDOUT
from dit_engine.console.run import INTERRUPTED
from dit_engine.io.printable import one_line, printable, say
from dit_engine.io.provenance import without_paths

Keep = Callable[[], object]
"""What to call whenever the report has grown."""
Fill = Callable[[Progress, Keep], object]
"""Measures into a report."""


def carry_out(report: Report, fill: Fill, arguments: argparse.Namespace) -> int:
    """Measure, write the report, and print its tables: a whole command without other outputs."""
    return finish(report, fill_report(report, fill, arguments), arguments)


@contextmanager
def true_float32() -> Iterator[None]:
    """Inside the block, float32 products and convolutions do not use TF32: references need this."""
    import torch

    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


@true_float32()
def fill_report(report: Report, fill: Fill, arguments: argparse.Namespace) -> BaseException | None:
    """Returns the exception that ended the run early, or None; raises it if nothing was measured.
    While the report grows, it is kept in a file beside ``--json``."""
    paths = getattr(arguments, "record_paths", False)
    try:
        fill(
            Progress(getattr(arguments, "quiet", False)),
            partial(write_partial, report, arguments.json, paths),
        )
    except (KeyboardInterrupt, Exception) as error:  # any exception: what is finished is kept
        if not report["rows"]:
            raise
        report["complete"] = False
        if not isinstance(error, KeyboardInterrupt):
            report["failure"] = one_line(error) or type(error).__name__
        return error
    report["complete"] = True
    return None


def finish(
    report: Report,
    failure: BaseException | None,
    arguments: argparse.Namespace,
    code: int = 0,
    write_more: Callable[[Report], object] = lambda _: None,
) -> int:
    """Write and print the report; returns the exit code. Raises ``failure`` unless it is Ctrl-C.

    Exit code 1: a subject of the measurement computes another function, or broke.
    """
    from dit_bench.show.reports import report_tables
    from dit_bench.show.tables import show

    paths = getattr(arguments, "record_paths", False)
    shown = report if paths else without_paths(report)
    withdraw_verdicts(shown)
    validate(shown)
    write(shown, arguments.json, paths)
    if arguments.json not in (None, STDOUT):
        partial_path(arguments.json).unlink(missing_ok=True)
    write_more(shown)
    files = [getattr(arguments, name, None) for name in ("json", "csv", "html")]
    if STDOUT not in files:
        show(report_tables(shown), wide=arguments.wide)
    if isinstance(failure, KeyboardInterrupt):
        kept = [printable(path) for path in files if path not in (None, STDOUT)]
        where = f"in {', '.join(kept)}" if kept else "above"
        say(f"interrupted: what was measured until then is {where}", file=sys.stderr)
        return INTERRUPTED
    if failure is not None:
        raise failure
    bad = any(r["status"] in ("wrong", "failed") and r.get("role") == "subject"
              for r in report["rows"])  # fmt: skip
    return 1 if bad else code


def give_up(
    report: Report, arguments: argparse.Namespace, first: Callable[[], object] = lambda: None
) -> None:
    """Print which lines were running, print and write the report so far, call ``first``, and end
    this process with code 1. Another thread must call it, because a thread that waits for a device
    cannot be interrupted."""
    try:
        faulthandler.dump_traceback(file=2)
        report["failure"] = "it did not end in time"
        finish(report, None, arguments)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        first()
    finally:
        os._exit(1)


def check_threads(threads: int | None) -> None:
    count = os.cpu_count() or 1
    if threads is not None and threads > count:
        raise ValueError(f"threads {threads} is above the {count} of this machine")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)
