"""``dit-bench --model …``: its options, the plan that follows from them, and the run."""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path

import torch

from dit_bench.command import check_threads, fill_report, finish, positive
from dit_bench.contenders import check_backend, parse_peers
from dit_bench.machine import describe, overview
from dit_bench.outputs import check_folder, check_outputs, csv_text, json_text, write_text
from dit_bench.progress import LEAST_ROUNDS, LONGEST
from dit_bench.quality.paired import SET_OPTIONS, add_set_arguments, refuse_given, set_comparison
from dit_bench.report import WORK, Report, new_report, read
from dit_bench.speed.latency import NOISE_BOUND
from dit_bench.speed.models import Plan, measure
from dit_bench.subjects import check_name
from dit_engine.backends import PRECISIONS, resolve_backend
from dit_engine.console.output import STDOUT, destination
from dit_engine.console.parser import add_backend_argument
from dit_engine.io.files import atomic_path
from dit_engine.io.printable import printable, say
from dit_engine.io.provenance import without_paths
from dit_engine.runtime import parse_device
from dit_engine.sampling.samplers import SAMPLERS
from dit_engine.sampling.schedule import make_schedule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", "--models", nargs="+", dest="models", metavar="MODEL",
        help="published sizes (XL/2: random weights), 'builtin', paths, hub ids")  # fmt: skip
    add_backend_argument(parser)
    add("--precision", default="fp32", help="fp32, bf16, fp16, int8 or fp8")
    add("--peers", default="", help="in the same run: diffusers,compile,openvino,onnxruntime,unet; "
        "any backend; with a precision of its own as in onnxruntime/fp32")  # fmt: skip
    add("--batch", type=positive, nargs="+", default=[1], metavar="N", help="images at once")
    add("--size", type=int, choices=(256, 512), help="pixels of published sizes, 256 unless given")
    add("--only", nargs="+", choices=WORK, default=WORK, metavar="KIND", help=", ".join(WORK))
    add("--vae", help="another VAE for a checkpoint: file, directory or hub id")
    add("--steps", type=int, default=20, help="of a whole generation, 1 to 1000")
    add("--sampler", default="ddpm", help="of a whole generation: ddpm, ddim or dpm++")
    add("--rounds", type=positive, default=20, help="of timing in each part, at most")
    add("--seconds", type=float, default=20.0, help="of timing in each part: then no round begins "
        f"once {LEAST_ROUNDS} are done; of long rounds there are fewer, and no verdict, so that a "
        f"part takes at most {LONGEST:g} times the seconds, or one round")  # fmt: skip
    add("--threads", type=positive, help="of the CPU; torch's own choice unless given")
    add("--device", help="cpu or cuda; CUDA where there is one unless given")
    add("--parity", action="store_true", help="paired samples against eager float32 as well")
    add("--samples", type=positive, default=8, help="images of --parity")
    add_set_arguments(parser)
    for name, text in (("--json", "every figure"), ("--csv", "one line per row")):
        add(name, type=destination, nargs="?", const=STDOUT, metavar="FILE", help=text)
    add("--plot", type=Path, metavar="DIR", help="directory for figures, PNG files")
    add("--html", type=Path, metavar="FILE", help="one self-contained page")
    add("--compare", type=Path, metavar="FILE", help="an older --json; exit code 1 on a "
        "regression, 3 where times are too noisy to tell")  # fmt: skip
    add("--strict", action="store_true", help="with --compare: 1 for whatever cannot be judged")
    add("--operators", type=Path, metavar="FILE", help="the --json of dit-bench operators")
    add("--load", type=Path, metavar="FILE", help="show a finished --json, and measure nothing")
    add("--env", action="store_true", help="what this machine has, and no more")
    add("--record-paths", action="store_true", help="record whole paths in reports, not only names")
    add("--wide", action="store_true", help="tables with all columns, wider than the terminal")
    add("--quiet", action="store_true", help="no progress bars")


def run(arguments: argparse.Namespace) -> int:
    if arguments.env:
        return _show_environment(arguments)
    if arguments.strict and arguments.compare is None:
        raise ValueError("--strict is for --compare, which is not given")
    check_outputs((arguments.json, arguments.csv, arguments.html))
    check_folder(arguments.plot)
    old = None if arguments.compare is None else read(arguments.compare)
    operators = None if arguments.operators is None else read(arguments.operators, "operators")
    if arguments.load is None:
        plan = plan_of(arguments)
        settings = {
            "backend": plan.subject[0], "precision": plan.subject[1], "rounds": plan.rounds,
            "seconds": plan.seconds, "steps": plan.steps, "sampler": plan.sampler,
            "peers": ["/".join(pair) for pair in plan.peers], "noise_bound": NOISE_BOUND,
        }  # fmt: skip
        machine = describe(plan.device) | {"threads": plan.threads or torch.get_num_threads()}
        report = new_report("models", machine, settings, arguments.given)
    elif arguments.models:
        raise ValueError("--load shows a finished report; --model has no place beside it")
    else:
        plan, report = None, read(arguments.load)
    if arguments.plot or arguments.html:
        from dit_bench.show.plots import require_matplotlib

        require_matplotlib()
    failure: BaseException | None = None
    if plan is not None:
        failure = fill_report(report, partial(measure, plan, report), arguments)
        for row in report["rows"] if failure is None else ():
            if row.get("role") == "subject" and row["status"] in ("skipped", "failed"):
                where = f"{row['case']}, {row['section']}"
                failure = ValueError(f"{row['contender']} did not run ({where}): {row['reason']}")
                break
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
    return finish(report, failure, arguments, code, partial(_write_more, arguments))


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Check every option before any work. Raises ValueError, BackendUnavailable or ImportError."""
    if not arguments.models:
        raise ValueError("--model is missing: a published size such as XL/2, 'builtin' or a path")
    for name in arguments.models:
        check_name(name, arguments.size, arguments.vae)
    names = {without_paths(name): name for name in arguments.models}
    if not arguments.record_paths and len(names) < len(set(arguments.models)):
        same = [name for name in arguments.models if name not in names.values()]
        raise ValueError(f"{same[0]!r} has the name of another model: give --record-paths too")
    backend, precision = resolve_backend(arguments.backend), arguments.precision
    for option, value, known in (("precision", precision, PRECISIONS),
                                 ("sampler", arguments.sampler, SAMPLERS)):  # fmt: skip
        if value not in known:
            raise ValueError(f"{option} {value!r}: choose one of {', '.join(known)}")
    peers = parse_peers(arguments.peers, precision) if arguments.peers else []
    make_schedule(arguments.steps)
    if not 0 < arguments.seconds < math.inf:
        raise ValueError(f"seconds {arguments.seconds} is not a finite number above 0")
    check_threads(arguments.threads)
    if not arguments.parity:
        refuse_given(arguments, SET_OPTIONS, "--parity")
    device = parse_device(arguments.device)
    check_backend(backend, precision, device)
    return Plan(
        models=tuple(dict.fromkeys(arguments.models)),
        subject=(backend, precision),
        device=device,
        peers=tuple(peers),
        batches=tuple(dict.fromkeys(arguments.batch)),
        kinds=tuple(kind for kind in WORK if kind in arguments.only),
        parity=arguments.samples if arguments.parity else 0,
        sets=set_comparison(arguments, device) if arguments.parity else None,
        **{name: getattr(arguments, name) for name in
           ("size", "vae", "steps", "sampler", "rounds", "seconds", "threads")},
    )  # fmt: skip


def _write_more(arguments: argparse.Namespace, report: Report) -> None:
    write_text(csv_text(report), arguments.csv)
    if arguments.plot is None and arguments.html is None:
        return
    from dit_bench.show.page import page
    from dit_bench.show.plots import all_figures, drawn

    figures = all_figures(report)
    if arguments.plot is not None and not figures:
        say(f"note: nothing is drawn into {printable(arguments.plot)}: there are no times of "
            "forwards beside peers or of several models, and no --operators",
            file=sys.stderr)  # fmt: skip
    elif arguments.plot is not None:
        arguments.plot.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            with atomic_path(arguments.plot / f"{name}.png") as picture:
                picture.write_bytes(drawn(figure, "png"))
    if arguments.html is not None:
        write_text(page(report, figures), arguments.html)


def _show_environment(arguments: argparse.Namespace) -> int:
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
