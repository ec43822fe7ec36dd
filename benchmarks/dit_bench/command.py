"""``dit-bench --model …``: its options, and what becomes of the report."""

from __future__ import annotations

import argparse
import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_bench.inputs import read_operators, read_report, read_scaling
from dit_bench.outputs import STDOUT, check_outputs, csv_text, write_json, write_text
from dit_bench.schema import VERSION, validate
from dit_engine.cli.arguments import Parser

if TYPE_CHECKING:
    from dit_bench.measure import Plan
    from dit_bench.progress import Progress

SIZES = (256, 512)
KINDS = ("forward", "step", "decode", "image")


def build_parser(about: str) -> argparse.ArgumentParser:
    parser = Parser("dit-bench", about)
    add = parser.add_argument
    add("--model", "--models", nargs="+", dest="models", metavar="MODEL",
        help="published sizes (XL/2: random weights), 'builtin', paths, hub ids")  # fmt: skip
    add("--backend", default="auto", help="auto, lean, eager, compile, trt, …")
    add("--precision", default="fp32", help="fp32, bf16, fp16, int8 or fp8")
    add("--peers", default="", help="in the same run: diffusers,compile,openvino,onnxruntime,unet; "
        "any backend; with a precision of its own as in onnxruntime/fp32")  # fmt: skip
    add("--batch", type=_positive, nargs="+", default=[1], metavar="N", help="images at once")
    add("--size", type=int, choices=SIZES, help="pixels, of published sizes; 256 unless given")
    add("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND",
        help=", ".join(KINDS))  # fmt: skip
    add("--vae", help="another VAE for a checkpoint: file, directory or hub id")
    add("--steps", type=int, default=20, help="of a whole generation, 1 to 1000")
    add("--sampler", default="ddpm", help="of a whole generation: ddpm, ddim or dpm++")
    add("--rounds", type=_positive, default=20, help="of interleaved timing, at most")
    add("--seconds", type=float, default=20.0, help="of timing, for each part of the run")
    add("--threads", type=_positive, help="of the CPU; torch's own choice unless given")
    add("--device", help="cpu or cuda; CUDA where there is one unless given")
    add("--parity", action="store_true", help="paired samples against eager float32 as well")
    add("--samples", type=_positive, default=8, help="images of --parity")
    add("--json", type=Path, nargs="?", const=STDOUT, metavar="FILE", help="every figure")
    add("--csv", type=Path, nargs="?", const=STDOUT, metavar="FILE", help="one line a measurement")
    add("--plot", type=Path, metavar="DIR", help="figures as PNG files")
    add("--html", type=Path, metavar="FILE", help="one self-contained page")
    add("--compare", type=Path, metavar="FILE", help="an older --json; exit code 1 on a regression")
    add("--operators", type=Path, metavar="FILE", help="--json of python -m dit_bench.operators")
    add("--scaling", type=Path, metavar="FILE", help="--json of python -m dit_bench.scaling")
    add("--load", type=Path, metavar="FILE", help="show a finished --json, and measure nothing")
    add("--env", action="store_true", help="what this machine has, and no more")
    add("--quiet", action="store_true", help="no progress bars")
    return parser


def run(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    """Measure or load, then write everything; the exit code."""
    if arguments.env:
        return _show_environment(arguments)
    outputs = (arguments.json, arguments.csv, arguments.html)
    if sum(path == STDOUT for path in outputs) > 1:
        raise ValueError("--json and --csv cannot both go to standard output: name a file")
    check_outputs(outputs)
    if arguments.plot is not None and arguments.plot.exists() and not arguments.plot.is_dir():
        raise ValueError(f"{arguments.plot} is a file; --plot needs a directory")
    if STDOUT not in outputs:
        from dit_bench.tables import require_rich

        require_rich()
    if arguments.plot or arguments.html:
        from dit_bench.drawing import require_matplotlib

        require_matplotlib()
    old = None if arguments.compare is None else read_report(arguments.compare)
    scaling = None if arguments.scaling is None else read_scaling(arguments.scaling)
    operators = None if arguments.operators is None else read_operators(arguments.operators)
    sheets: list[Any] = []
    if arguments.load is not None:
        report = read_report(arguments.load)
    else:
        report = _measured(arguments, given, sheets)
    if operators is not None:
        report["operators"] = operators
    code, nothing_common = 0, None
    if old is not None:
        from dit_bench.comparing import compare_reports, regressions

        try:
            report["comparison"] = compare_reports(report, old)
            code = 1 if regressions(report["comparison"]) else 0
        except ValueError as error:  # said once everything is written
            nothing_common = ValueError(f"{arguments.compare}: {error}")
    if any(row["status"] == "wrong" and row["role"] == "subject" for row in report["measurements"]):
        code = 1  # what was to be measured computes another function
    validate(report)
    _write(report, arguments, scaling, sheets)
    if nothing_common is not None:
        raise nothing_common
    return 130 if report["interrupted"] and arguments.load is None else code


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Every option checked, before any work. Raises ValueError, BackendUnavailable, ImportError."""
    from dit_bench.contenders import check_backend, parse_peers
    from dit_bench.measure import Plan
    from dit_bench.subjects import check_name, is_size
    from dit_engine.backends import PRECISIONS, resolve_backend
    from dit_engine.device import parse_device
    from dit_engine.sampler import SAMPLERS
    from dit_engine.schedule import make_schedule

    if not arguments.models:
        raise ValueError("--model is missing: a published size such as XL/2, 'builtin' or a path")
    for name in arguments.models:
        check_name(name, arguments.size)
        if arguments.size is not None and not is_size(name):
            raise ValueError(f"--size is for published models; {name!r} has its own")
        if arguments.vae is not None and is_size(name):
            raise ValueError(f"--vae is for checkpoints; {name!r} gets random weights")
    backend, precision = resolve_backend(arguments.backend), arguments.precision
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
    peers = parse_peers(arguments.peers, precision) if arguments.peers else []
    if arguments.sampler not in SAMPLERS:
        raise ValueError(f"sampler {arguments.sampler!r}: choose one of {', '.join(SAMPLERS)}")
    make_schedule(arguments.steps)
    if not arguments.seconds > 0:
        raise ValueError(f"seconds {arguments.seconds} is not above 0")
    count = os.cpu_count() or 1
    if arguments.threads is not None and arguments.threads > count:
        raise ValueError(f"threads {arguments.threads} is above the {count} of this machine")
    device = parse_device(arguments.device)
    check_backend(backend, precision, device)
    return Plan(
        models=tuple(dict.fromkeys(arguments.models)),
        subject=(backend, precision),
        device=device,
        peers=tuple(peers),
        batches=tuple(dict.fromkeys(arguments.batch)),
        kinds=tuple(kind for kind in KINDS if kind in arguments.only),
        size=arguments.size,
        vae=arguments.vae,
        steps=arguments.steps,
        sampler=arguments.sampler,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        threads=arguments.threads,
        parity=arguments.samples if arguments.parity else 0,
    )


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
        "models": [],
        "measurements": [],
        "parity": [],
        "interrupted": False,
    }  # fmt: skip


def _measured(
    arguments: argparse.Namespace, given: Sequence[str], sheets: list[Any]
) -> dict[str, Any]:
    from dit_bench.measure import measure
    from dit_bench.progress import Progress

    plan = plan_of(arguments)
    report, progress = new_report(plan, given), Progress(arguments.quiet)
    try:
        engines = measure(plan, report, progress)
        if arguments.html is not None:
            sheets += _sheets(plan, engines, progress)
    except KeyboardInterrupt:
        if not report["measurements"]:
            raise
        report["interrupted"] = True
    return report


def _sheets(plan: Plan, engines: Sequence[Any], progress: Progress) -> list[Any]:
    from dit_bench.samples import sample_sheets
    from dit_engine.device import limited_threads

    found: list[Any] = []
    with limited_threads(plan.threads), progress.run(2 * plan.steps * len(engines)):
        for engine in engines:
            progress.stage("samples")
            found += sample_sheets(
                engine, plan.subject, plan.steps, plan.sampler, lambda _: progress.done()
            )
    return found


def _write(
    report: dict[str, Any], arguments: argparse.Namespace, scaling: Any, sheets: list[Any]
) -> None:
    write_json(report, arguments.json)
    write_text(csv_text(report), arguments.csv)
    if arguments.plot or arguments.html:
        from dit_bench.drawing import save_figures
        from dit_bench.plots import all_figures

        figures = all_figures(report, scaling)
        if arguments.plot is not None:
            save_figures(figures, arguments.plot)
        if arguments.html is not None:
            from dit_bench.page import page

            write_text(page(report, figures, sheets), arguments.html)
    if STDOUT not in (arguments.json, arguments.csv):
        from dit_bench.report import report_tables
        from dit_bench.tables import show

        show(report_tables(report))


def _show_environment(arguments: argparse.Namespace) -> int:
    from dit_bench.environment import environment

    found = environment()
    if arguments.json is not None:
        write_json(found, arguments.json)
        return 0
    for part, values in found.items():
        print(part)
        for name, value in values.items():
            print(f"  {name:<15} {value}")
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)
