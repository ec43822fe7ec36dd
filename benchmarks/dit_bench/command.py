"""``dit-bench --model …``: a run, and what becomes of its report."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_bench.inputs import read_operators, read_report, read_scaling
from dit_bench.load import withdraw_verdicts
from dit_bench.options import plan_of
from dit_bench.outputs import (
    STDOUT,
    check_folder,
    check_outputs,
    csv_text,
    partial_path,
    write_json,
    write_text,
)
from dit_bench.schema import VERSION, validate
from dit_engine.io.printable import one_line, printable, say
from dit_engine.io.provenance import without_paths

if TYPE_CHECKING:
    from dit_bench.measure import Plan
    from dit_bench.progress import Progress

INTERRUPTED = 130  # exit code


def run(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    """Measure or load, then write everything; the exit code.

    What ends a run early is raised once everything that was finished is written.
    """
    if arguments.env:
        return _show_environment(arguments)
    if arguments.strict and arguments.compare is None:
        raise ValueError("--strict is for --compare, which is not given")
    outputs = (arguments.json, arguments.csv, arguments.html)
    check_outputs(outputs)
    check_folder(arguments.plot)
    old = None if arguments.compare is None else read_report(arguments.compare)
    scaling = None if arguments.scaling is None else read_scaling(arguments.scaling)
    operators = None if arguments.operators is None else read_operators(arguments.operators)
    report, plan = None, None
    if arguments.load is None:
        plan = plan_of(arguments)
    elif arguments.models:
        raise ValueError("--load shows a finished report; --model has no place beside it")
    else:
        report = read_report(arguments.load)
    if STDOUT not in outputs:
        from dit_bench.show.tables import require_rich

        require_rich()
    if arguments.plot or arguments.html:
        from dit_bench.show.drawing import require_matplotlib

        require_matplotlib()
    sheets: list[Any] = []
    failure: BaseException | None = None
    if plan is not None:
        report, failure = _measured(plan, arguments, given, sheets)
    assert report is not None
    if not arguments.record_paths:
        report = without_paths(report)
    withdraw_verdicts(report)
    if operators is not None:
        report["operators"] = operators
    code = 0
    if old is not None:
        from dit_bench.comparing import compare_reports, exit_code

        try:
            report["comparison"] = compare_reports(*map(without_paths, (report, old)))
            code = exit_code(report["comparison"], arguments.strict)
        except ValueError as error:
            failure = failure or ValueError(f"{arguments.compare}: {error}")
    if any(row["status"] == "wrong" and row["role"] == "subject" for row in report["measurements"]):
        code = 1  # what was to be measured computes another function
    validate(report)
    _write(report, arguments, scaling, sheets)
    if isinstance(failure, KeyboardInterrupt):
        kept = [printable(path) for path in outputs if path not in (None, STDOUT)]
        where = f"in {', '.join(kept)}" if kept else "above"
        say(f"interrupted: what was measured until then is {where}", file=sys.stderr)
        return INTERRUPTED
    if failure is not None:
        raise failure
    return code


def new_report(plan: Plan, given: Sequence[str]) -> dict[str, Any]:
    """A report of ``plan`` with nothing measured yet."""
    import torch

    from dit_bench.environment import describe
    from dit_bench.latency import NOISE_BOUND

    backend, precision = plan.subject
    return {
        "schema": VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": list(given),
        "environment": describe(plan.device),
        "settings": {
            "backend": backend, "precision": precision, "device": str(plan.device),
            "threads": plan.threads or torch.get_num_threads(), "rounds": plan.rounds,
            "seconds": plan.seconds, "steps": plan.steps, "sampler": plan.sampler,
            "peers": ["/".join(pair) for pair in plan.peers], "noise_bound": NOISE_BOUND,
        },
        "ceilings": None,
        "energy": None,
        "load_average": None,
        "other_load": None,
        "models": [],
        "measurements": [],
        "parity": [],
        "interrupted": False,
    }  # fmt: skip


def _measured(
    plan: Plan, arguments: argparse.Namespace, given: Sequence[str], sheets: list[Any]
) -> tuple[dict[str, Any], BaseException | None]:
    """The report, and what is to be raised once it is written."""
    from dit_bench.measure import measure
    from dit_bench.progress import Progress

    report, progress = new_report(plan, given), Progress(arguments.quiet)
    keep = partial(_keep, report, arguments.json, arguments.record_paths)
    try:
        engines = measure(plan, report, progress, keep)
        if arguments.html is not None:
            sheets += _sheets(plan, engines, progress)
    except (KeyboardInterrupt, Exception) as error:  # of any kind: what is finished is kept
        if not report["measurements"]:
            raise
        report["interrupted"] = True
        if not isinstance(error, KeyboardInterrupt):
            report["failure"] = one_line(error) or type(error).__name__
        return report, error
    return report, _not_run(report)


def _keep(report: dict[str, Any], path: Path | None, paths: bool) -> None:
    """What is measured so far, as <name>.partial beside the JSON that is asked for, so that it is
    there however the run ends."""
    if path is not None and path != STDOUT:
        write_json({**report, "interrupted": True}, partial_path(path), paths)


def _not_run(report: dict[str, Any]) -> ValueError | None:
    """What to say where the backend that was asked for could not run after all."""
    for row in report["measurements"]:
        if row["role"] == "subject" and row["status"] == "skipped":
            what = f"{row['model']} {row['what']}, {row['images']}"
            return ValueError(f"{row['name']} did not run ({what}): {row['reason']}")
    return None


def _sheets(plan: Plan, engines: Sequence[Any], progress: Progress) -> list[Any]:
    from dit_bench.samples import sample_sheets
    from dit_engine.runtime import limited_threads

    found: list[Any] = []

    def stepped(_: object) -> None:
        progress.done()
        progress.check()

    with limited_threads(plan.threads), progress.run(2 * plan.steps * len(engines)):
        for engine in engines:
            progress.stage("samples for the page")
            found += sample_sheets(engine, plan.subject, plan.steps, plan.sampler, stepped)
    return found


def _write(
    report: dict[str, Any], arguments: argparse.Namespace, scaling: Any, sheets: list[Any]
) -> None:
    write_json(report, arguments.json, arguments.record_paths)
    if arguments.json is not None and arguments.load is None:
        partial_path(arguments.json).unlink(missing_ok=True)
    write_text(csv_text(report), arguments.csv)
    if arguments.plot or arguments.html:
        from dit_bench.show.drawing import save_figures
        from dit_bench.show.plots import all_figures

        figures = all_figures(report, scaling)
        if arguments.plot is not None and figures:
            save_figures(figures, arguments.plot)
        elif arguments.plot is not None:
            say(f"note: nothing is drawn into {printable(arguments.plot)}: there are no times of "
                "forwards or guided steps, no --operators and no --scaling",
                file=sys.stderr)  # fmt: skip
        if arguments.html is not None:
            from dit_bench.show.page import page

            write_text(page(report, figures, sheets), arguments.html)
    if STDOUT not in (arguments.json, arguments.csv, arguments.html):
        from dit_bench.show.reports import report_tables
        from dit_bench.show.tables import show

        show(report_tables(report), wide=arguments.wide)


def _show_environment(arguments: argparse.Namespace) -> int:
    from dit_bench.environment import overview

    found = without_paths(overview())
    if arguments.json is not None:
        check_outputs([arguments.json])
        write_json(found, arguments.json)
        return 0
    for part, values in found.items():
        say(part)
        for name, value in values.items():
            say(f"  {name:<15} {value}")
    return 0
