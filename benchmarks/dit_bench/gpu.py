"""One command that measures DiT Engine on a CUDA machine: ``python -m dit_bench.gpu``.

In this order: what the machine is; what it reaches at best (matrix products, copies); every
operator, checked against float64, then timed against eager torch, torch.compile and torch's other
attention kernels; the VAE's decoder; forwards and whole generations of the published sizes with
every backend, one of them to pixels; last, attention kernels of other packages. The JSON file is
written as it goes, as <name>.partial; what the time did not suffice for is named there as skipped.
It takes its name, and an earlier result's place, once the run is complete or its time is up.

A failed check is never timed, and makes the exit code 1. It is 2 where nothing could be measured,
and 3 for a run in which nothing failed but which had to be ended because its time was up.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dit_bench.budget import Budget
from dit_bench.ceilings import Ceilings, measure_ceilings
from dit_bench.gpu_contenders import CUDA_CONTENDERS, Contender, cuda_contenders
from dit_bench.gpu_environment import describe_environment, gpu_state
from dit_bench.gpu_models import ModelBenchmark
from dit_bench.gpu_report import Report, check_report_path, failure, skipped
from dit_bench.gpu_table import format_table
from dit_bench.gpu_vae import DecodeBenchmark
from dit_bench.operator_cases import Case, all_cases
from dit_bench.operator_checks import DeviceLost
from dit_bench.operators import OperatorBenchmark
from dit_engine.cli.arguments import Parser
from dit_engine.cli.errors import one_line, run_command
from dit_engine.cli.start import entry
from dit_engine.config import ModelConfig
from dit_engine.vae import VAEConfig

SIZES = ("XL/2", "S/2", "L/2", "B/2")
"""In the order of their worth, should time run out."""
LAST_WORDS_SECONDS = 10.0
START_SECONDS, RESERVE_SECONDS = 15.0, 15.0
"""Kept back: for the imports, which came before the clock started, and for the table."""
CEILINGS_SHARE, OPERATORS_SHARE, DECODE_SHARE, MODELS_SHARE = 0.1, 0.35, 0.15, 0.95
"""Of what is left then."""
LATE = 3
"""The exit code of a run in which nothing failed, but which did not end in time."""


@dataclass
class Plan:
    """What is measured on which device; the defaults are those of a CUDA machine."""

    device: torch.device
    configs: dict[str, ModelConfig]
    cases: Sequence[Case]
    contenders: Sequence[Contender] = CUDA_CONTENDERS
    batches: Sequence[int] = (1, 2, 8, 32, 64)
    images: Sequence[int] = (1, 8, 32)
    rounds: int = 30
    ceilings: dict[str, Any] = field(default_factory=dict)
    """Keywords of `measure_ceilings`."""
    impls: Sequence[str] | None = None
    opposed: bool = True
    vae: VAEConfig = field(default_factory=VAEConfig)
    decoded_side: int = 32
    """Of the latents that the decoder is timed with: 256 pixels."""


def run(plan: Plan, report: Report, budget: Budget) -> int:
    """Measure everything, section by section; 0, or 1 if a check failed."""
    started = time.monotonic()
    try:
        with torch.inference_mode(), true_float32():
            _sections(plan, report, budget)
        report.put("complete", True)
    except DeviceLost as lost:
        report.record("sections", {"section": "all that follows", "status": "failed",
                                   "reason": one_line(lost)})  # fmt: skip
    report.put("seconds", time.monotonic() - started)
    if report.values["complete"]:
        report.finish()
    return 1 if report.failed else 0


def _sections(plan: Plan, report: Report, budget: Budget) -> None:
    nothing = Ceilings(float("nan"), {}, 0, 0)

    def state(moment: str) -> None:
        now = _described(f"state: {moment}", lambda: gpu_state(plan.device), report)
        report.put("gpu_state", report.values.get("gpu_state", {}) | {moment: now})

    def ceilings(_: Budget) -> Ceilings:
        found = measure_ceilings(plan.device, **plan.ceilings)
        report.put("ceilings", vars(found))
        return found

    def benchmark(part: Budget) -> OperatorBenchmark:
        return OperatorBenchmark(report, plan.device, part, best, plan.impls, plan.opposed,
                                 plan.rounds)  # fmt: skip

    def decode(part: Budget) -> None:
        DecodeBenchmark(report, plan.device, part, plan.vae, plan.decoded_side,
                        rounds=plan.rounds).run()  # fmt: skip

    def models(part: Budget) -> None:
        ModelBenchmark(report, plan.device, part, best, plan.contenders, plan.batches,
                       plan.images, plan.rounds, plan.vae).run(plan.configs)  # fmt: skip

    described = _described("environment", lambda: describe_environment(plan.device), report)
    report.put("environment", described)
    state("start")
    best = _section("ceilings", ceilings, report, budget.part(CEILINGS_SHARE)) or nothing
    state("warm")
    _section("operators", lambda part: benchmark(part).run(plan.cases), report,
             budget.part(OPERATORS_SHARE))  # fmt: skip
    _section("decode", decode, report, budget.part(DECODE_SHARE))
    _section("models", models, report, budget.part(MODELS_SHARE))
    state("end")
    # Last, because they may lose the device.
    _section("other packages' attention", lambda part: benchmark(part).run_third_party(plan.cases),
             report, budget)  # fmt: skip


def _described(name: str, find: Callable[[], dict[str, Any]], report: Report) -> dict[str, Any]:
    """What ``find`` tells of the machine; where it breaks, nothing, which the report says."""
    try:
        return find()
    except Exception as error:  # no reason to measure nothing
        report.record("sections", {"section": name} | skipped(error))
        return {}


def _section(name: str, measure: Callable[[Budget], Any], report: Report, part: Budget) -> Any:
    """One section's outcome; a section that breaks is recorded, and the next one begins."""
    row = {"section": name}
    if part.left() <= 0:
        report.record("sections", row | skipped("time budget"))
        return None
    started = time.monotonic()
    try:
        result = measure(part)
    except DeviceLost:
        raise
    except Exception as error:
        report.record("sections", row | failure(error))
        return None
    seconds = time.monotonic() - started
    report.record("sections", row | {"status": "ok", "seconds": seconds})
    return result


@contextmanager
def true_float32() -> Iterator[None]:
    """Float32 products and convolutions in float32 and not in TF32, which the references need."""
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def stop_late(report: Report, seconds: float) -> threading.Timer:
    """A started timer that prints the table and ends the process after ``seconds``, with exit code
    1 if a check had failed, else `LATE`.

    A signal cannot interrupt a call that waits for a hung kernel; a thread can end the process.
    """

    def tell() -> None:
        reason = f"did not end in {seconds:.0f} s: slow, or hung"
        report.record("sections", {"section": "run", "status": "late", "reason": reason})
        report.finish()
        print(format_table(report.snapshot()), flush=True)

    def stop() -> None:
        # In a thread of its own: the main one may hold the report, and never give it back.
        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        code = LATE
        try:
            teller.join(LAST_WORDS_SECONDS)
            code = 1 if report.failed else LATE
        finally:
            os._exit(code)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    return timer


def default_path(device_name: str) -> Path:
    """benchmarks/results/gpu-<device>.json of this checkout, or of the working directory."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    here = Path(__file__).resolve().parents[1] / "results"
    return (here if here.is_dir() else Path()) / f"gpu-{slug}.json"


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("python -m dit_bench.gpu", "Check and time DiT Engine on a CUDA device.")
    add = parser.add_argument
    add("--minutes", type=float, default=9.0, help="the whole run ends by then")
    add("--sizes", nargs="+", default=list(SIZES), help="models, such as XL/2; 'none' for none")
    add("--json", type=Path, help="benchmarks/results/gpu-<device>.json unless given")
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)

    def command() -> int:
        if not torch.cuda.is_available():
            print(f"error: no CUDA device: torch {torch.__version__} finds none, and this "
                  "benchmark is for CUDA (dit_bench.operators --device cpu is for the CPU)",
                  file=sys.stderr)  # fmt: skip
            return 2
        seconds = 60 * arguments.minutes - START_SECONDS
        if not seconds > RESERVE_SECONDS:
            least = (START_SECONDS + RESERVE_SECONDS) / 60
            raise ValueError(f"minutes {arguments.minutes:g} is not above {least:g}")
        sizes = [] if arguments.sizes == ["none"] else arguments.sizes
        configs = {size: ModelConfig.named(size) for size in sizes}
        device = torch.device("cuda", torch.cuda.current_device())
        path = arguments.json or default_path(torch.cuda.get_device_name())
        check_report_path(path)
        budget = Budget(seconds - RESERVE_SECONDS)
        report = Report(path, {"minutes": arguments.minutes})
        timer = stop_late(report, seconds)
        plan = Plan(device, configs, all_cases(device), cuda_contenders())
        code = run(plan, report, budget)
        timer.cancel()
        print(format_table(report.values))
        print(f"written: {report.path}")
        return code

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
