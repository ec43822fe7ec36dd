"""One command that measures DiT Engine on a CUDA machine: ``python -m dit_bench.gpu``.

In the order of their worth, should time run out: what the machine is, and what it reaches at best
(matrix products, copies); forwards of XL/2 with 64 and with 2 rows and the generations of as many,
with every backend and its peers; every operator at those shapes, checked against float64, then
timed against eager torch, torch.compile and torch's other attention kernels; the VAE's decoder; the
other batches and sizes, and generations to pixels; what takes minutes to get ready; the operators
at ragged shapes, checked only; last, attention kernels of other packages. The JSON file is written
as it goes, as <name>.partial; what the time did not suffice for is named there as skipped. It takes
its name, and an earlier result's place, once the run is complete or its time is up.

A failed check is never timed, and makes the exit code 1. It is 2 where nothing could be measured,
and 3 for a run in which nothing failed but which had to be ended because its time was up.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported
    from dit_engine.first import leave_out_of_path

    leave_out_of_path()
    from dit_engine.console.run import wait_briefly

    wait_briefly()

import argparse
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dit_bench.budget import Budget
from dit_bench.ceilings import Ceilings, measure_ceilings
from dit_bench.gpu_contenders import CUDA_CONTENDERS, Contender, cuda_contenders
from dit_bench.gpu_environment import describe_environment, gpu_state
from dit_bench.gpu_models import ModelBenchmark, Work
from dit_bench.gpu_report import Report, check_report_path, failure, skipped
from dit_bench.gpu_table import WIDTH, format_table
from dit_bench.gpu_vae import DecodeBenchmark
from dit_bench.operator_cases import Case, all_cases
from dit_bench.operator_checks import DeviceLost
from dit_bench.operators import OperatorBenchmark
from dit_bench.show.tables import fold, narrower_than
from dit_engine.config import ModelConfig
from dit_engine.console.parser import Parser
from dit_engine.console.run import entry, run_command
from dit_engine.io.printable import one_line, printable, say
from dit_engine.vae import VAEConfig

SIZES = ("XL/2", "S/2", "L/2", "B/2")
"""In the order of their worth, should time run out."""
LAST_WORDS_SECONDS = 10.0
START_SECONDS, RESERVE_SECONDS = 15.0, 15.0
"""Kept back: for the imports, which came before the clock started, and for the table."""
SHARES = {"ceilings": 0.1, "first model": 0.4, "operators": 0.6, "decode": 0.3, "models": 0.6,
          "late": 0.7, "ragged operators": 0.8, "other packages' attention": 1.0}  # fmt: skip
"""Section → what it may use of the time that is left when it begins, in their order."""
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
    first_rows: Sequence[int] = (64, 2)
    """Of the first model, before anything else is timed: batches, and as many rows of images."""
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

    def operators(part: Budget, timed: bool) -> None:
        cases = [case for case in plan.cases if case.timed == timed]
        _operators(plan, report, part, best).run(cases)

    def third_party(part: Budget) -> None:
        _operators(plan, report, part, best).run_third_party(plan.cases)

    def decode(part: Budget) -> None:
        DecodeBenchmark(report, plan.device, part, plan.vae, plan.decoded_side,
                        rounds=plan.rounds).run()  # fmt: skip

    def models(part: Budget, works: Sequence[Work], late: bool = False) -> None:
        ModelBenchmark(report, plan.device, part, best, plan.contenders, plan.rounds,
                       plan.vae).run(works, late)  # fmt: skip

    def section(name: str, measure: Callable[[Budget], Any]) -> Any:
        return _section(name, measure, report, budget.part(SHARES[name]))

    described = _described("environment", lambda: describe_environment(plan.device), report)
    report.put("environment", described)
    state("start")
    best = section("ceilings", ceilings) or nothing
    state("warm")
    first, rest = _works(plan)
    section("first model", lambda part: models(part, first))
    section("operators", lambda part: operators(part, timed=True))
    section("decode", decode)
    section("models", lambda part: models(part, rest))
    everything = [Work(n, c, plan.batches, plan.images) for n, c in plan.configs.items()]
    section("late", lambda part: models(part, everything, late=True))
    section("ragged operators", lambda part: operators(part, timed=False))
    state("end")
    # Last, because they may lose the device.
    section("other packages' attention", third_party)


def _operators(plan: Plan, report: Report, part: Budget, best: Ceilings) -> OperatorBenchmark:
    return OperatorBenchmark(report, plan.device, part, best, plan.impls, plan.opposed,
                             plan.rounds)  # fmt: skip


def _works(plan: Plan) -> tuple[list[Work], list[Work]]:
    """What is measured of the first model at first, and of all models later."""
    now: list[Work] = []
    rest = [Work(name, config, plan.batches, plan.images) for name, config in plan.configs.items()]
    if rest:
        whole = rest[0]
        batches = [n for n in plan.first_rows if n in whole.batches]
        images = [n // 2 for n in plan.first_rows if n % 2 == 0 and n // 2 in whole.images]
        now = [replace(whole, batches=batches, images=images, pixels=False)]
        rest[0] = replace(
            whole,
            batches=[n for n in whole.batches if n not in batches],
            images=[n for n in whole.images if n not in images],
        )
    return now, rest


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


def _table(values: dict[str, Any]) -> str:
    return fold(format_table(values, short=narrower_than(WIDTH)))


def stop_late(report: Report, seconds: float) -> threading.Timer:
    """A started timer that prints the table and ends the process after ``seconds``, with exit code
    1 if a check had failed, else `LATE`.

    A signal cannot interrupt a call that waits for a hung kernel; a thread can end the process.
    """

    def tell() -> None:
        reason = f"did not end in {seconds:.0f} s: slow, or hung"
        report.record("sections", {"section": "run", "status": "late", "reason": reason})
        report.finish()
        say(_table(report.snapshot()), flush=True)

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


def cuda_device() -> torch.device | None:
    """The current CUDA device, or None."""
    available = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if available else None


def cuda_plan(device: torch.device, configs: dict[str, ModelConfig]) -> Plan:
    """Everything, of these models."""
    return Plan(device, configs, all_cases(device), cuda_contenders())


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
        device = cuda_device()
        if device is None:
            say(f"error: no CUDA device: torch {torch.__version__} finds none, and this "
                  "benchmark is for CUDA (dit_bench.operators --device cpu is for the CPU)",
                  file=sys.stderr)  # fmt: skip
            return 2
        seconds = 60 * arguments.minutes - START_SECONDS
        if not seconds > RESERVE_SECONDS:
            least = (START_SECONDS + RESERVE_SECONDS) / 60
            raise ValueError(f"minutes {arguments.minutes:g} is not above {least:g}")
        sizes = [] if arguments.sizes == ["none"] else arguments.sizes
        configs = {size: ModelConfig.named(size) for size in sizes}
        path = arguments.json or default_path(torch.cuda.get_device_name(device))
        check_report_path(path)
        budget = Budget(seconds - RESERVE_SECONDS)
        report = Report(path, {"minutes": arguments.minutes})
        timer = stop_late(report, seconds)
        code = run(cuda_plan(device, configs), report, budget)
        timer.cancel()
        say(_table(report.values))
        say(f"written: {printable(report.path)}")
        return code

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
