"""Speed of the lean forward on this CPU beside its peers, as ratios from one interleaved run.

``python -m dit_bench.cpu`` compares DiT-XL/2 at 256 px, DiT-S/2, the built-in model and the VAE's
decoder with diffusers, OpenVINO and torch.compile on the same weights and inputs, prints a table
and writes it as JSON. Every peer's result is compared with float32 eager first. Ratios mean
something on an idle machine only: the load at the start is recorded. ``--profile`` tells where
the lean forward's time goes instead, ``--busy 1`` what another program's work costs.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported
    from dit_engine.first import leave_out_of_path

    leave_out_of_path()
    from dit_engine.console.run import wait_briefly

    wait_briefly()

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dit_bench import cpu_busy
from dit_bench.cpu_report import WIDTH, environment, format_profile, format_table, slug
from dit_bench.cpu_sections import (
    Log,
    Section,
    Settings,
    run_decode,
    run_forward,
    run_memory,
    run_profile,
)
from dit_bench.hardware import cpu_model, load_average, settle
from dit_bench.load import NO_VERDICT, OtherLoad, not_quoted, warning
from dit_bench.show.tables import fold, narrower_than
from dit_engine.console.output import check_file
from dit_engine.console.parser import Parser
from dit_engine.console.run import entry, run_command
from dit_engine.io.files import atomic_path
from dit_engine.io.printable import printable, say
from dit_engine.io.provenance import without_paths
from dit_kernels.quantized import quantized_why_not

# Models with the batches that they are measured at; then what is measured otherwise.
BATCHES = {"XL/2": (2,), "S/2": (2, 16), "builtin": (2, 16)}
WORKLOADS = (*BATCHES, "vae", "memory")
# Of max-autotune one knows that, frozen, it takes minutes and settles on the same products, and
# that otherwise it changes nothing here.
COMPILE_MODES = ("default", "frozen default")
ROUNDS, QUICK_ROUNDS = 15, 3
RESULTS = Path(__file__).parents[1] / "results"


def plan(
    arguments: argparse.Namespace, log: Log, others: OtherLoad | None = None
) -> list[Callable[[], Section]]:
    """The sections to be measured, in order; others: what is to be told of other programs."""
    quick = arguments.quick
    settings = Settings(
        arguments.rounds or (QUICK_ROUNDS if quick else ROUNDS),
        arguments.threads,
        COMPILE_MODES[:1] if quick else COMPILE_MODES,
        others or OtherLoad(),
    )
    if arguments.busy:
        count = arguments.busy
        return [
            lambda name=name, batch=batch: cpu_busy.run_busy(name, batch, count, settings, log)
            for name, batch in cpu_busy.WORKLOADS
            if name in (arguments.only or ["S/2"] * quick or BATCHES)
        ]
    if arguments.profile:
        models = arguments.only or ["S/2" if quick else "XL/2"]
        precisions = ["bf16"]
        if (reason := quantized_why_not("int8", torch.device("cpu"))) is None:
            precisions.append("int8")
        else:
            log(f"int8 skipped: {reason}")
        return [
            lambda name=name, precision=precision: run_profile(name, precision, settings, log)
            for name in models
            for precision in precisions
        ]
    chosen = arguments.only or (["S/2"] if quick else WORKLOADS)
    jobs: list[Callable[[], Section]] = [
        lambda name=name, batch=batch: run_forward(name, batch, settings, log)
        for name in BATCHES
        if name in chosen
        for batch in (BATCHES[name][:1] if quick else BATCHES[name])
    ]
    if "vae" in chosen:
        jobs.append(lambda: run_decode(settings, log))
    if "memory" in chosen:
        jobs.append(lambda: run_memory("S/2" if quick else "XL/2", settings, log))
    return jobs


def measure(arguments: argparse.Namespace, log: Log = print) -> dict[str, Any]:
    """Everything that was asked for, as one JSON-ready dictionary."""
    load, others = load_average(), OtherLoad()
    torch.set_num_threads(arguments.threads)
    sections = []
    for job in plan(arguments, log, others):
        sections.append(job())
        torch.compiler.reset()  # what was compiled holds its model's weights
        gc.collect()
    report = {"load_average": load, "other_load": others.mean, **environment()}
    report["sections"] = sections
    if not_quoted(report) is not None:
        for row in (row for section in sections for row in section.get("rows", [])):
            if row.get("result") in ("pass", "miss") and "ratio" in row:
                row["result"] = NO_VERDICT
    return report


def format_report(report: dict[str, Any], short: bool = False) -> str:
    """The table of everything measured, and what it was measured on; short: as `format_table`."""
    hardware, versions = report["hardware"], report["versions"]
    rows = [row for section in report["sections"] for row in section.get("rows", [])]
    lines = [format_table(rows, short)] if rows else []
    lines += [format_profile(section) for section in report["sections"] if "profile" in section]
    lines += [cpu_busy.format_busy(section) for section in report["sections"] if "busy" in section]
    found = ", ".join(f"{name} {value or '(not installed)'}" for name, value in versions.items())
    threads, instructions = hardware["torch_threads"], " ".join(report["instruction_sets"])
    lines += ["", f"{hardware['cpu']}, {threads} threads, {instructions}; {found}"]
    if (busy := warning(report)) is not None:
        lines.append(busy)
    return "\n".join(lines)


def destination(arguments: argparse.Namespace) -> Path | None:
    """Where the JSON goes: as asked, else among the results if the run was a whole one."""
    if arguments.json is not None:
        return arguments.json
    whole = not (arguments.quick or arguments.only or arguments.profile or arguments.busy)
    return RESULTS / f"cpu-{slug(cpu_model())}.json" if whole and RESULTS.is_dir() else None


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("python -m dit_bench.cpu", "The lean forward beside its peers on this CPU.")
    add = parser.add_argument
    add("--quick", action="store_true", help=f"S/2 at batch 2, {QUICK_ROUNDS} rounds, one compile")
    add("--rounds", type=_positive, help=f"of interleaved timing ({ROUNDS} unless given)")
    add("--threads", type=_positive, default=torch.get_num_threads(), help="of every runtime")
    add("--only", nargs="+", choices=WORKLOADS, metavar="WORKLOAD", help=", ".join(WORKLOADS))
    add("--profile", action="store_true", help="where the lean forward's time goes, and no peers")
    add("--busy", type=_positive, metavar="COUNT",
        help="lean and peers beside COUNT programs that each keep a processor busy")  # fmt: skip
    add("--wide", action="store_true", help="all columns, wider than the terminal")
    add("--json", type=Path, help="write every figure here (whole runs: benchmarks/results)")
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Raise a one-line ValueError for options that do not go together."""
    count = os.cpu_count() or 1
    if arguments.threads > count:
        raise ValueError(f"threads {arguments.threads} is above the {count} of this machine")
    if arguments.profile and arguments.busy:
        raise ValueError("--profile and --busy: give one of the two")
    for name in arguments.only or ():
        if arguments.profile and name not in BATCHES:
            raise ValueError(f"--profile {name}: choose one of {', '.join(BATCHES)}")
        if arguments.busy and name not in (allowed := dict(cpu_busy.WORKLOADS)):
            raise ValueError(f"--busy {name}: choose one of {', '.join(allowed)}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


@entry
def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)

    def command() -> int:
        check(arguments)
        path = destination(arguments)
        if path is not None:
            check_file(path)  # before the long run
        if not arguments.quick:
            settle(print)
        report = measure(arguments)
        if arguments.wide:
            say(format_report(report))
        else:
            say(fold(format_report(report, short=narrower_than(WIDTH))))
        if path is not None:
            text = json.dumps(without_paths(report), indent=2) + "\n"
            with atomic_path(path) as partial:
                partial.write_text(text, encoding="utf-8")
            say(f"written to {printable(path)}")
        return 0

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
