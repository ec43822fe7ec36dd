"""One command that measures DiT Engine on a CUDA machine: ``python -m dit_bench.gpu``.

In this order: what the machine is; what it reaches at best (matrix products, copies); every
operator, checked against float64, then timed against eager torch, torch.compile and other
attention kernels; forwards and whole generations of the published sizes with every backend. The
JSON file is written as it goes; what the time did not suffice for is named there as skipped. A
failed check is never timed, and makes the exit code 1.
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
from dit_bench.gpu_contenders import CUDA_CONTENDERS, Contender
from dit_bench.gpu_environment import describe_environment, gpu_state
from dit_bench.gpu_models import ModelBenchmark
from dit_bench.gpu_report import Report, check_report_path, failure, skipped
from dit_bench.gpu_table import format_table
from dit_bench.operator_cases import Case, all_cases
from dit_bench.operator_checks import DeviceLost
from dit_bench.operators import OperatorBenchmark
from dit_engine.cli.arguments import Parser
from dit_engine.cli.errors import one_line, run_command
from dit_engine.config import ModelConfig

SIZES = ("XL/2", "S/2", "L/2", "B/2")
"""In the order of their worth, should time run out."""
START_SECONDS, RESERVE_SECONDS = 15.0, 15.0
"""Kept back: for the imports, which came before the clock started, and for the table."""
CEILINGS_SHARE, OPERATORS_SHARE = 0.1, 0.35


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


def run(plan: Plan, report: Report, budget: Budget) -> int:
    """Measure everything, section by section; 0, or 1 if a check failed."""
    started = time.monotonic()
    report.put("environment", describe_environment(plan.device))
    report.put("gpu_state", {"start": gpu_state(plan.device)})
    try:
        with torch.inference_mode(), true_float32():
            _sections(plan, report, budget)
        report.put("complete", True)
    except DeviceLost as lost:
        report.record("sections", {"section": "all that follows", "status": "failed",
                                   "reason": one_line(lost)})  # fmt: skip
    report.put("seconds", time.monotonic() - started)
    return 1 if report.failed else 0


def _sections(plan: Plan, report: Report, budget: Budget) -> None:
    nothing = Ceilings(float("nan"), {}, 0, 0)

    def ceilings(_: Budget) -> Ceilings:
        found = measure_ceilings(plan.device, **plan.ceilings)
        report.put("ceilings", vars(found))
        report.put("gpu_state", report.values["gpu_state"] | {"warm": gpu_state(plan.device)})
        return found

    def operators(part: Budget) -> None:
        OperatorBenchmark(report, plan.device, part, best, plan.impls, plan.opposed,
                          plan.rounds).run(plan.cases)  # fmt: skip

    def models(part: Budget) -> None:
        ModelBenchmark(report, plan.device, part, best, plan.contenders, plan.batches,
                       plan.images, plan.rounds).run(plan.configs)  # fmt: skip
        report.put("gpu_state", report.values["gpu_state"] | {"end": gpu_state(plan.device)})

    best = _section("ceilings", ceilings, report, budget.part(CEILINGS_SHARE)) or nothing
    _section("operators", operators, report, budget.part(OPERATORS_SHARE))
    _section("models", models, report, budget)


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
    """A started timer that prints the table and ends the process after ``seconds``.

    A signal cannot interrupt a call that waits for a hung kernel; a thread can end the process.
    """

    def stop() -> None:
        reason = f"did not end in {seconds:.0f} s"
        try:
            report.record("sections", {"section": "run", "status": "failed", "reason": reason})
            print(format_table(report.values), flush=True)
        finally:
            os._exit(1)

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
        code = run(Plan(device, configs, all_cases(device)), report, budget)
        timer.cancel()
        print(format_table(report.values))
        print(f"written: {path}")
        return code

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
