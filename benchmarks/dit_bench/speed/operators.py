"""``dit-bench operators``: checks the operators of dit_kernels against float64, then times them.

More than 300 lines, because it holds checking, timing and printing of one measurement.

An implementation passes with at most twice the error of the torch reference in the same dtype; an
opponent whose output is wrong is not timed either. Of each shape it prints the median, the rate,
its percentage of the ceiling measured in the same run, and the speed-up over what a plain torch
model runs and over torch.compile.

On a CPU arguments stay in the caches where they fit, so that more than 100 % of the rate of a
large copy is possible; on CUDA the caches are overwritten before every sample.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_bench.ceilings import NAMES, Ceilings, measure_ceilings
from dit_bench.load import OtherLoad
from dit_bench.machine import SETTLE_S, describe, load_average, settle
from dit_bench.progress import Progress
from dit_bench.report import Report, Row, new_report
from dit_bench.speed.operator_cases import Case, all_cases
from dit_bench.speed.operator_contenders import (
    THIRD_PARTY,
    Find,
    Run,
    Target,
    implementations,
    opponents,
    tensors,
)
from dit_bench.timing import Budget, interleave, ratio, spread
from dit_engine.io.printable import one_line
from dit_engine.runtime import parse_device

ERROR_RATIO = 2.0
"""An implementation's error against float64 over the same-dtype reference's, at most."""
OPPONENT_RATIO = 20.0
"""The same for opponents, who need not round as carefully: beyond it their output is wrong."""
TIMING_SECONDS = 3.0
WAIT_SHARE = 0.5
"""Of the minutes that were asked for, at most so much is spent on waiting for an idle machine."""


class DeviceLost(RuntimeError):
    """The device answers no more, and nothing after this could be measured."""


def measure(
    cases: Iterable[Case],
    report: Report,
    device: torch.device,
    budget: Budget,
    ceilings: Ceilings | None,
    *,
    rounds: int = 30,
    progress: Progress | None = None,
    keep: Callable[[], object] = lambda: None,
    find: Callable[[Case, torch.device], Mapping[str, Find]] | None = None,
) -> None:
    """Add a row for every case and contender to the report.

    find: which implementations there are; `implementations` unless given.

    Raises `DeviceLost` where nothing more could be measured.
    """
    for case in cases:
        if progress is not None:
            progress.stage(f"{case.operator} {case.shape}")
        if budget.left() <= 0:
            report["rows"].append(_row(case, "all") | _skipped("no time was left"))
            continue
        ours = (find or implementations)(case, device)
        others = opponents(case, device) if case.timed else {}
        report["rows"] += rows_of(case, device, ours, others, rounds, ceilings)
        keep()
        if progress is not None:
            progress.done()


def measure_third_party(
    cases: Iterable[Case], report: Report, device: torch.device, ceilings: Ceilings, rounds: int
) -> None:
    """Attention kernels of other packages beside ours, which are not recorded again. To be run
    last, because one that accesses memory which is not its own ends the use of the device."""
    for case in cases:
        if case.operator != "attention" or device.type != "cuda" or not case.timed:
            continue
        try:
            rows = rows_of(
                case, device, implementations(case, device), THIRD_PARTY, rounds, ceilings
            )
        except DeviceLost as lost:
            rows = [_row(case, "third party", "peer") | _skipped(lost)]
        report["rows"] += [row for row in rows if row["role"] == "peer"]


def rows_of(
    case: Case,
    device: torch.device,
    ours: Mapping[str, Find],
    others: Mapping[str, Find],
    rounds: int,
    ceilings: Ceilings | None,
) -> list[Row]:
    """Check everyone, and time those that passed if the case is a timed one."""
    target = Target(case, case.inputs(device))
    passed: dict[str, Run] = {}
    rows = [_check(target, name, find, "subject", passed) for name, find in ours.items()]
    rows += [_check(target, name, find, "peer", passed) for name, find in others.items()]
    if case.timed and any(row["status"] == "ok" for row in rows[: len(ours)]):
        assert ceilings is not None
        calls = {name: partial(run, *target.arguments) for name, run in passed.items()}
        try:
            samples = interleave(calls, rounds, device=device, visit_ms=0, pause_s=0, warmup=2,
                                 seconds=TIMING_SECONDS)  # fmt: skip
        except Exception as broken:
            _check_device(device, f"the timing of {case.operator} {case.shape}")
            for row in rows:
                if row["status"] == "ok":
                    row |= _failed(broken)
            return rows
        moved = least_traffic(target.arguments, tensors(target.same))
        for row in rows:
            if row["status"] == "ok":
                row |= figures(case, row["contender"], samples, moved, ceilings)
    return rows


def _check(target: Target, name: str, find: Find, role: str, passed: dict[str, Run]) -> Row:
    """The row of one contender; it joins ``passed`` if its outputs are right."""
    from dit_kernels import Unavailable

    case, row = target.case, _row(target.case, name, role)
    allowed = ERROR_RATIO if role == "subject" else OPPONENT_RATIO
    try:
        run = find()
        found, error = target.worst(run)
    except (Unavailable, ImportError) as reason:
        return row | _skipped(reason)
    except Exception as broken:  # whatever a kernel may die of, the others are still measured
        _check_device(target.device, f"{case.operator} {case.shape}, {name}")
        return row | (_failed(broken) if role == "subject" else _skipped(broken))
    row |= {"error": error, "error_over_reference": found}
    if not found <= allowed:
        reason = f"error {error:.3g} is {found:.3g} times the reference's, allowed is {allowed:g}"
        return row | {"status": "wrong", "reason": reason}
    passed[name] = run
    return row | {"status": "ok"}


def figures(
    case: Case, name: str, samples: Mapping[str, Sequence[float]], moved: int, ceilings: Ceilings
) -> Row:
    """Milliseconds, rate, percentage of the ceiling, and how many times as quick as each other."""
    taken = spread(samples[name])
    if case.flops:
        kind = case.operator.removeprefix("linear_")
        numbers = kind if kind in ("int8", "fp8") else NAMES[case.dtype]
        rate, unit = case.flops / taken.median / 1e9, "TFLOP/s"
        ceiling = ceilings.matmul_tflop_s.get(numbers)
    else:
        rate, unit, ceiling = moved / taken.median / 1e6, "GB/s", ceilings.copy_gb_s
    return {
        "ms": vars(taken),
        "flops": case.flops,
        "bytes": moved,
        "rate": rate,
        "unit": unit,
        "percent_of_ceiling": None if ceiling is None else 100 * rate / ceiling,
        "speedup_over": {
            other: ratio(samples[other], samples[name]).median for other in samples if other != name
        },
    }


def least_traffic(arguments: Iterable[Any], outputs: Iterable[Tensor]) -> int:
    """Bytes if every argument is read once and every output written once."""
    read = [a for a in arguments if isinstance(a, Tensor)]
    return sum(t.nbytes for t in (*read, *outputs))


def _check_device(device: torch.device, culprit: str) -> None:
    """Raises `DeviceLost`, naming the culprit, if a CUDA error has ended the process's context."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        first = str(error).strip().split("\n")[0]
        raise DeviceLost(f"the device failed in {culprit}: {first}") from None


def _row(case: Case, name: str, role: str = "subject") -> Row:
    return {"section": "operator", "case": f"{case.operator} {case.shape}", "contender": name,
            "role": role, "operator": case.operator, "shape": case.shape,
            "dtype": NAMES[case.dtype]}  # fmt: skip


def _skipped(reason: object) -> Row:
    return {"status": "skipped", "reason": one_line(reason)[:300]}


def _failed(error: BaseException) -> Row:
    return {"status": "failed", "reason": f"{type(error).__name__}: {one_line(error)[:300]}"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", help="cpu or cuda; CUDA where there is one unless given")
    add("--minutes", type=float, default=5.0, help="what is not measured by then is skipped; "
        "with --json, up to half of it may be a wait for an idle CPU")  # fmt: skip
    add("--rounds", type=int, default=30, help="samples of each function")
    add("--only", default="", help="operators whose names contain this")
    add("--wide", action="store_true", help="all columns, wider than the terminal")
    add("--json", type=Path, metavar="FILE", help="write every figure here")


def run(arguments: argparse.Namespace) -> int:
    from dit_bench.command import carry_out
    from dit_bench.outputs import check_outputs

    device = parse_device(arguments.device)
    cases = [case for case in all_cases(device) if arguments.only in case.operator]
    if not cases:
        raise ValueError(f"--only {arguments.only!r} is part of no operator's name")
    if not 0 < arguments.minutes < math.inf:
        raise ValueError(f"minutes {arguments.minutes:g} is not a finite number above 0")
    check_outputs([arguments.json])
    budget = Budget(60 * arguments.minutes)
    settings = {"minutes": arguments.minutes, "rounds": arguments.rounds}
    report = new_report("operators", describe(device), settings, arguments.given)
    if device.type == "cpu" and arguments.json is not None:
        settle(print, min(SETTLE_S, WAIT_SHARE * budget.left()))
    report["load_average"] = load_average()

    def fill(progress: Progress, keep: Callable[[], object]) -> None:
        others = OtherLoad(known=device.type == "cpu")  # what a GPU does is not in it
        with torch.inference_mode(), progress.run(len(cases)):
            ceilings = measure_ceilings(device)
            report["ceilings"] = vars(ceilings)
            options: dict[str, Any] = {"rounds": arguments.rounds, "progress": progress}
            with others.sampled():
                measure(cases, report, device, budget, ceilings, keep=keep, **options)
                measure_third_party(cases, report, device, ceilings, arguments.rounds)
        report["other_load"] = others.mean

    return carry_out(report, fill, arguments)
