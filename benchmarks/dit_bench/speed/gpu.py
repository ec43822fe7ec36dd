"""``dit-bench gpu``: checks and measures DiT Engine on a CUDA machine in a limited time.

All kernels are compiled first, in parallel. Then the most important parts come first, in case time
runs out: the machine's ceilings; steps and forwards of XL/2 with many rows and with few; attention
and products with all candidates, each checked against float64, then timed; row kernels; the kernels
of one step; whole generations; compiled blocks; the VAE's decoder; ragged shapes and other sizes.
Results so far are in <name>.partial beside the JSON file. While a part runs, the GPU's clock,
power, temperature and throttling are sampled (`dit_bench.machine.DeviceState`) into its rows.

``--check`` only checks, see `dit_bench.speed.gpu_check`.

A result that fails its check is never timed, and the exit code is then 1. An error loses only the
rows of its own part. If a kernel hangs, or an illegal memory access makes the device unusable for
this process, the program restarts itself, see `dit_bench.speed.gpu_parts`. A run that does not end
in time prints where it was, and shows and writes its results so far. Without a CUDA device the exit
code is 2.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dit_bench.ceilings import FP8, Ceilings, measure_ceilings
from dit_bench.contenders import Name
from dit_bench.load import OtherLoad
from dit_bench.machine import describe, slug
from dit_bench.progress import Progress
from dit_bench.report import Report, new_report, read
from dit_bench.speed import gpu_check, operators
from dit_bench.speed.forward import Work
from dit_bench.speed.gpu_check import compile_kernels, model_calls, operator_calls
from dit_bench.speed.gpu_parts import (
    RESERVE_SECONDS,
    START_SECONDS,
    Group,
    Part,
    restart,
    take,
)
from dit_bench.speed.latency import Timer
from dit_bench.speed.models import Plan, measure_model, open_model
from dit_bench.speed.operator_cases import all_cases, ragged_cases
from dit_bench.speed.profile import kernel_row
from dit_bench.subjects import check_name
from dit_bench.timing import Budget
from dit_engine.backends.lean.choice_file import remembered
from dit_engine.runtime import bfloat16_why_not

SIZES = ("XL/2", "S/2", "B/2", "L/2")
"""Model sizes, the most important first."""
SUBJECT: Name = ("lean", "bf16")
FP8_PEER: Name = ("lean", "fp8")
EAGER: Name = ("eager", "bf16")
MANY, FEW, ROUNDS, SECONDS = 64, 2, 30, 2.0
IMAGE_SECONDS = 12.0  # five rounds of 32 images
CEILING_SECONDS = 2.0
LAST_SECONDS = 4.0
"""Of `RESERVE_SECONDS`, for the table of a run that did not end in time."""
MINUTES, CHECK_MINUTES = 9.0, 3.5
RESULTS = Path(__file__).parents[2] / "results"


def groups(device: torch.device, sizes: Sequence[str], report: Report) -> Iterator[Group]:
    """The parts of a measurement, the most important first."""
    opened = functools.lru_cache(1)(
        partial(open_model, Plan((), SUBJECT, device, kinds=("image",)))
    )

    def work(name: str, kind: str, images: int, *peers: Name) -> Part:
        plan = Plan((name,), SUBJECT, device, peers, (images,), (kind,), sampler="dpm++")
        against = ", ".join(map(" ".join, peers))
        seconds = IMAGE_SECONDS if kind == "image" else SECONDS
        return f"{name} {kind}, {images} ({against})", lambda timer: measure_model(
            plan, opened(name), report, replace(timer, seconds=seconds), lambda: None
        )

    def kernels(name: str, images: int, precision: str) -> Part:
        return f"kernels of {name}, {images}, {precision}", lambda _: report["rows"].append(
            kernel_row(name, Work(opened(name).networks, images), precision)
        )

    def operator_parts(cases: Any) -> list[Part]:
        return [(case.title, partial(_operator, case, report)) for case in cases]

    cases = all_cases(device)
    products = [case for case in cases if case.flops]
    row_kernels = [case for case in cases if not case.flops]
    numbers = (MANY // 2, FEW // 2)
    first, rest = sizes[:1], sizes[1:]
    graph, blocks = ("graph", "bf16"), ("autotuned blocks graph", "bf16")
    compiled = ("compile vae", "bf16")
    yield 0.5, [work(n, "step", i, FP8_PEER, EAGER) for n in first for i in numbers]
    yield 0.5, [work(n, "forward", i, FP8_PEER, EAGER, graph) for n in first for i in (MANY, FEW)]
    yield 0.5, operator_parts(products)
    yield 0.5, operator_parts(row_kernels)
    yield 0.9, [kernels(n, i, p) for n in first for i in numbers for p in ("bf16", "fp8")]
    yield 0.7, [*(work(n, "image", i, FP8_PEER, EAGER) for n in first for i in (1, 8)),
                *(work(n, "image", MANY // 2, FP8_PEER) for n in first)]  # fmt: skip
    yield 0.8, [work(n, "forward", i, blocks) for n in first for i in (MANY, FEW)]
    yield 0.7, [work(n, "decode", i, EAGER, compiled) for n in first for i in (1, 8)]
    yield 0.5, operator_parts(ragged_cases())
    compiling = (
        f"compile {', '.join(rest)}",
        lambda _: report["rows"].append(compile_kernels(device, model_calls(device, rest))),
    )
    yield 1.0, [compiling, *(work(n, "step", i, FP8_PEER) for n in rest for i in numbers)]


def _operator(case: Any, report: Report, timer: Timer) -> None:
    budget = timer.budget or Budget(0)
    with torch.inference_mode():
        operators.measure([case], report, timer.device, budget, timer.ceilings, rounds=ROUNDS,
                          progress=timer.progress)  # fmt: skip


def sustained_ceilings(device: torch.device, report: Report) -> Ceilings:
    """The ceilings in the report; they are measured if the report has none."""
    if (found := report.get("ceilings")) is not None:
        return Ceilings(**{each.name: found[each.name] for each in fields(Ceilings)})
    taken = measure_ceilings(device, dtypes=(torch.bfloat16, FP8), seconds=CEILING_SECONDS)
    report["ceilings"] = {**vars(taken), "measured": f"sustained for {CEILING_SECONDS:g} s in"}
    return taken


def cuda_device() -> torch.device:
    """The current CUDA device. Raises ValueError if there is none, or one without bfloat16."""
    if not torch.cuda.is_available():
        raise ValueError(
            f"no CUDA device: torch {torch.__version__} finds none, and this is for CUDA "
            "(dit-bench cpu and dit-bench operators --device cpu are for the CPU)"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    if (reason := bfloat16_why_not(device)) is not None:
        raise ValueError(f"{reason}, which dit-bench gpu checks and measures")
    return device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--check", action="store_true", help="check everything and time nothing")
    add("--minutes", type=float, help="the whole run ends by then; "
        f"{MINUTES:g} unless given, and {CHECK_MINUTES:g} with --check")  # fmt: skip
    add("--sizes", nargs="+", default=list(SIZES), help="models, such as XL/2; 'none' for none")
    add("--wide", action="store_true", help="all columns, wider than the terminal")
    add("--json", type=Path, metavar="FILE",
        help="benchmarks/results/gpu-<device>.json unless given or --check")  # fmt: skip
    add("--resume", type=Path, help=argparse.SUPPRESS)  # the report of a run that lost its device


def run(arguments: argparse.Namespace) -> int:
    from dit_bench.command import carry_out, give_up
    from dit_bench.outputs import check_outputs

    device = cuda_device()
    minutes = arguments.minutes or (CHECK_MINUTES if arguments.check else MINUTES)
    seconds = 60 * minutes - START_SECONDS
    if not seconds > RESERVE_SECONDS:
        least = (START_SECONDS + RESERVE_SECONDS) / 60
        raise ValueError(f"minutes {minutes:g} is not above {least:g}")
    sizes = [] if arguments.sizes == ["none"] else arguments.sizes
    for size in sizes:
        check_name(size)
    machine = describe(device)
    if arguments.json is None and not arguments.check:
        here = RESULTS if RESULTS.is_dir() else Path()
        arguments.json = here / f"gpu-{slug(machine['gpu'] or 'unknown')}.json"
    check_outputs([arguments.json])
    budget = Budget(seconds - RESERVE_SECONDS)
    report = new_report("gpu", machine, {"minutes": minutes, "steps": 20}, arguments.given)
    if arguments.resume is not None:
        report |= read(arguments.resume, "gpu")
    report.setdefault("parts_done", [])
    report.setdefault("models", [])

    end_tests = gpu_check.GpuTests.end
    last = threading.Timer(seconds - LAST_SECONDS, give_up, [report, arguments, end_tests])
    last.daemon = True

    def fill(progress: Progress, keep: Callable[[], object]) -> None:
        timer = Timer(device, ROUNDS, SECONDS, None, progress, OtherLoad(known=False), budget)
        if not arguments.check:
            timer.ceilings = sustained_ceilings(device, report)
        calls = chain(operator_calls(device), model_calls(device, sizes[:1]))
        report["rows"].append(compile_kernels(device, calls))
        again = partial(restart, arguments, report, budget)

        def keep_choices() -> None:
            report["choices"] = remembered()
            keep()

        planned = (gpu_check.groups if arguments.check else groups)(device, sizes, report)
        take(list(planned), timer, report, budget, keep_choices, again)
        last.cancel()

    if not faulthandler.is_enabled():
        faulthandler.enable(file=2)  # also prints where a library crashed
    # If even `give_up` does not come to its end, as where a call keeps Python's lock.
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    last.start()
    cudnn: Any = torch.backends.cudnn
    usual = cudnn.benchmark
    # Convolutions of all decoders that are timed are those that cuDNN measured as the fastest, as
    # in lean's graphs.
    cudnn.benchmark = not arguments.check
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            # The tests run beside a check, so what it measures and chooses is not kept for others.
            own = {"DIT_ENGINE_CACHE": folder} if arguments.check else {}
            with patch.dict(os.environ, own):
                return carry_out(report, fill, arguments)
    finally:
        cudnn.benchmark = usual
        last.cancel()
        faulthandler.cancel_dump_traceback_later()
        end_tests()
