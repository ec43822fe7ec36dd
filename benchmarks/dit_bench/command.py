"""A run of any command, and what becomes of its report; and ``dit-bench --model …`` itself.

What ends a run early is raised once everything that was finished is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dit_bench.options import plan_of
from dit_bench.outputs import check_folder, check_outputs, csv_text, json_text, write_text
from dit_bench.progress import Progress
from dit_bench.report import (
    Report,
    new_report,
    partial_path,
    read,
    validate,
    write,
    write_partial,
)
from dit_engine.console.output import STDOUT
from dit_engine.io.printable import one_line, printable, say
from dit_engine.io.provenance import without_paths

if TYPE_CHECKING:
    from dit_bench.speed.models import Plan

INTERRUPTED = 130  # exit code
Fill = Callable[[Progress, Callable[[], object]], object]
"""Measures into a report: (progress, what to call whenever the report has grown)."""


def carry_out(report: Report, fill: Fill, arguments: argparse.Namespace) -> int:
    """Measure, write, and print the tables: all of a command that has no other outputs."""
    from dit_bench.show.tables import require_rich

    require_rich()
    failure = fill_report(report, fill, arguments)
    return finish(report, failure, arguments)


def fill_report(report: Report, fill: Fill, arguments: argparse.Namespace) -> BaseException | None:
    """What ended the run early, if anything did. The report so far is kept beside ``--json`` as it
    grows; where nothing at all was measured, the exception is raised."""
    paths = getattr(arguments, "record_paths", False)
    try:
        fill(
            Progress(getattr(arguments, "quiet", False)),
            partial(write_partial, report, arguments.json, paths),
        )
    except (KeyboardInterrupt, Exception) as error:  # of any kind: what is finished is kept
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
    """Write and print the report; the exit code. Raises ``failure`` unless it is an interruption.

    Exit code 1: what was to be measured computes another function, or broke.
    """
    from dit_bench.load import withdraw_verdicts
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


def run(arguments: argparse.Namespace) -> int:
    """``dit-bench --model …`` or ``--load …``."""
    if arguments.env:
        return _show_environment(arguments)
    if arguments.strict and arguments.compare is None:
        raise ValueError("--strict is for --compare, which is not given")
    outputs = (arguments.json, arguments.csv, arguments.html)
    check_outputs(outputs)
    check_folder(arguments.plot)
    old = None if arguments.compare is None else read(arguments.compare)
    scaling = None if arguments.scaling is None else read(arguments.scaling, "scaling")
    operators = None if arguments.operators is None else read(arguments.operators, "operators")
    plan: Plan | None = None
    report: Report = {}
    if arguments.load is None:
        plan = plan_of(arguments)
    elif arguments.models:
        raise ValueError("--load shows a finished report; --model has no place beside it")
    else:
        report = read(arguments.load)
    if STDOUT not in outputs:
        from dit_bench.show.tables import require_rich

        require_rich()
    if arguments.plot or arguments.html:
        from dit_bench.show.drawing import require_matplotlib

        require_matplotlib()
    sheets: list[Any] = []
    failure: BaseException | None = None
    if plan is not None:
        report = report_of(plan, arguments.given)
        failure = fill_report(report, partial(_measure, plan, report, sheets), arguments)
        failure = failure or _not_run(report)
    if operators is not None:
        report["rows"] += operators["rows"]
        report.setdefault("ceilings", operators.get("ceilings"))
    code = 0
    if old is not None:
        from dit_bench.compare import compare_reports, exit_code

        try:
            report["comparison"] = compare_reports(*map(without_paths, (report, old)))
            code = exit_code(report["comparison"], arguments.strict)
        except ValueError as error:
            failure = failure or ValueError(f"{arguments.compare}: {error}")
    more = partial(_write_more, arguments, scaling, sheets)
    return finish(report, failure, arguments, code, more)


def report_of(plan: Plan, given: Sequence[str]) -> Report:
    """A report of ``plan`` with nothing measured yet."""
    import torch

    from dit_bench.machine import describe
    from dit_bench.speed.latency import NOISE_BOUND

    backend, precision = plan.subject
    settings = {
        "backend": backend, "precision": precision, "rounds": plan.rounds,
        "seconds": plan.seconds, "steps": plan.steps, "sampler": plan.sampler,
        "peers": ["/".join(pair) for pair in plan.peers], "noise_bound": NOISE_BOUND,
    }  # fmt: skip
    machine = describe(plan.device) | {"threads": plan.threads or torch.get_num_threads()}
    return new_report("models", machine, settings, given)


def _measure(
    plan: Plan, report: Report, sheets: list[Any], progress: Progress, keep: Callable[[], object]
) -> None:
    from dit_bench.speed.models import measure

    engines = measure(plan, report, progress, keep)
    if not engines:
        return
    from dit_bench.speed.generation import sample_sheets
    from dit_engine.runtime import limited_threads

    def stepped(_: object) -> None:
        progress.done()
        progress.check()

    with limited_threads(plan.threads), progress.run(2 * plan.steps * len(engines)):
        for engine in engines:
            progress.stage("samples for the page")
            sheets += sample_sheets(engine, plan.subject, plan.steps, plan.sampler, stepped)


def _not_run(report: Report) -> ValueError | None:
    """What to say where the backend that was asked for could not run after all."""
    for row in report["rows"]:
        if row.get("role") == "subject" and row["status"] == "skipped":
            what = f"{row['case']}, {row['section']}"
            return ValueError(f"{row['contender']} did not run ({what}): {row['reason']}")
    return None


def _write_more(
    arguments: argparse.Namespace, scaling: Report | None, sheets: list[Any], report: Report
) -> None:
    write_text(csv_text(report), arguments.csv)
    if arguments.plot is None and arguments.html is None:
        return
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


def _show_environment(arguments: argparse.Namespace) -> int:
    from dit_bench.machine import overview

    found = without_paths(overview())
    if arguments.json is not None:
        check_outputs([arguments.json])
        write_text(json_text(found), arguments.json)
        return 0
    for part, values in found.items():
        say(part)
        for name, value in values.items():
            say(f"  {name:<16} {value}")
    return 0
