"""The options of ``dit-bench --model …``, and the plan that they make, checked before any work."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dit_bench.progress import LEAST_ROUNDS, LONGEST
from dit_bench.quality.paired import SET_OPTIONS, add_set_arguments, refuse_given
from dit_bench.report import WORK
from dit_engine.console.output import STDOUT, destination
from dit_engine.console.parser import Parser, add_backend_argument
from dit_engine.io.provenance import without_paths

if TYPE_CHECKING:
    from dit_bench.speed.models import Plan

SIZES = (256, 512)


def build_parser(about: str) -> argparse.ArgumentParser:
    parser = Parser("dit-bench", about)
    add = parser.add_argument
    add("--model", "--models", nargs="+", dest="models", metavar="MODEL",
        help="published sizes (XL/2: random weights), 'builtin', paths, hub ids")  # fmt: skip
    add_backend_argument(parser)
    add("--precision", default="fp32", help="fp32, bf16, fp16, int8 or fp8")
    add("--peers", default="", help="in the same run: diffusers,compile,openvino,onnxruntime,unet; "
        "any backend; with a precision of its own as in onnxruntime/fp32")  # fmt: skip
    add("--batch", type=positive, nargs="+", default=[1], metavar="N", help="images at once")
    add("--size", type=int, choices=SIZES, help="pixels, of published sizes; 256 unless given")
    add("--only", nargs="+", choices=WORK, default=list(WORK), metavar="KIND",
        help=", ".join(WORK))  # fmt: skip
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
    file = {"type": destination, "nargs": "?", "const": STDOUT, "metavar": "FILE"}
    add("--json", **file, help="every figure")  # pyright: ignore[reportArgumentType]
    add("--csv", **file, help="one line per row")  # pyright: ignore[reportArgumentType]
    add("--plot", type=Path, metavar="DIR", help="directory for figures, PNG files")
    add("--html", type=Path, metavar="FILE", help="one self-contained page")
    add("--compare", type=Path, metavar="FILE", help="an older --json; exit code 1 on a "
        "regression, 3 where times are too noisy to tell")  # fmt: skip
    add("--strict", action="store_true", help="with --compare: 1 for whatever cannot be judged")
    add("--operators", type=Path, metavar="FILE", help="the --json of dit-bench operators")
    add("--scaling", type=Path, metavar="FILE", help="the --json of the study of scaling")
    add("--load", type=Path, metavar="FILE", help="show a finished --json, and measure nothing")
    add("--env", action="store_true", help="what this machine has, and no more")
    add("--record-paths", action="store_true", help="record whole paths in reports, not only names")
    add("--wide", action="store_true", help="tables with all columns, wider than the terminal")
    add("--quiet", action="store_true", help="no progress bars")
    return parser


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Every option checked, before any work. Raises ValueError, BackendUnavailable, ImportError."""
    from dit_bench.contenders import check_backend, parse_peers
    from dit_bench.quality.paired import set_comparison
    from dit_bench.speed.models import Plan
    from dit_bench.subjects import check_name
    from dit_engine.backends import PRECISIONS, resolve_backend
    from dit_engine.runtime import parse_device
    from dit_engine.sampling.samplers import SAMPLERS
    from dit_engine.sampling.schedule import make_schedule

    if not arguments.models:
        raise ValueError("--model is missing: a published size such as XL/2, 'builtin' or a path")
    for name in arguments.models:
        check_name(name, arguments.size, arguments.vae)
    names = {without_paths(name): name for name in arguments.models}
    if not arguments.record_paths and len(names) < len(set(arguments.models)):
        same = [name for name in arguments.models if name not in names.values()]
        raise ValueError(f"{same[0]!r} has the name of another model: give --record-paths too")
    backend, precision = resolve_backend(arguments.backend), arguments.precision
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
    peers = parse_peers(arguments.peers, precision) if arguments.peers else []
    if arguments.sampler not in SAMPLERS:
        raise ValueError(f"sampler {arguments.sampler!r}: choose one of {', '.join(SAMPLERS)}")
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
        size=arguments.size,
        vae=arguments.vae,
        steps=arguments.steps,
        sampler=arguments.sampler,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        threads=arguments.threads,
        parity=arguments.samples if arguments.parity else 0,
        sets=set_comparison(arguments, device) if arguments.parity else None,
        keep_engines=arguments.html is not None,
    )


def check_threads(threads: int | None) -> None:
    count = os.cpu_count() or 1
    if threads is not None and threads > count:
        raise ValueError(f"threads {threads} is above the {count} of this machine")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)
