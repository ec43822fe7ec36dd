"""``dit-bench operators``: checks the operators of dit_kernels against float64, then times them.

An implementation passes with at most twice the error of the torch reference in the same dtype; an
opponent whose output is wrong is not timed either. For each shape it prints the median, the rate,
its percentage of the ceiling measured in the same run, and the speed-up over what a plain torch
model runs and over torch.compile.

On a CPU, arguments that fit stay in the caches, so that more than 100 % of the rate of a large
copy is possible; on CUDA the caches are overwritten before every sample.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_bench.ceilings import Ceilings, measure_ceilings
from dit_bench.command import carry_out, positive
from dit_bench.contenders import failed
from dit_bench.load import OtherLoad
from dit_bench.machine import SETTLE_S, describe, load_average, settle
from dit_bench.progress import Progress
from dit_bench.report import Report, Row, new_report
from dit_bench.speed.operator_cases import (
    Case,
    Make,
    Run,
    all_cases,
    implementations,
    opponents,
)
from dit_bench.timing import Budget, interleave, ratio, spread
from dit_engine.io.printable import one_line
from dit_engine.runtime import parse_device
from dit_kernels import Unavailable

ERROR_RATIO = 2.0
"""An implementation's error against float64 over the same-dtype reference's, at most."""
OPPONENT_RATIO = 20.0
"""The same for opponents, who need not round as carefully: beyond it their output is wrong."""
TIMING_SECONDS = 3.0
WAIT_SHARE = 0.5
"""Of the minutes that were asked for, at most so much is spent on waiting for an idle machine."""


class Target:
    """The exact outputs of a case, and the errors of the reference in the same dtype."""

    def __init__(self, case: Case, arguments: tuple[Any, ...]) -> None:
        self.case, self.arguments = case, arguments
        exact = (case.exact or case.reference)(*map(_double, arguments))
        self.exact = tuple(t.double() for t in tensors(exact))
        self.same = case.reference(*arguments)
        self.budgets = self.errors(self.same)

    def errors(self, result: Any) -> list[float]:
        """`largest_error` of each output."""
        found = (self.case.values or tensors)(result)
        return [largest_error(a, b) for a, b in zip(found, self.exact, strict=True)]

    def worst(self, run: Run) -> tuple[float, float]:
        """(largest error over the reference's own, largest error) of two calls of ``run``.

        Memory that the outputs will probably get is filled with NaN beforehand, so that an element
        which is never written shows; a race may show in one of the calls.
        """
        ratios, errors = [], []
        for _ in range(2):
            # All ones is NaN in every floating dtype.
            filled = [torch.full((t.nbytes,), 255, dtype=torch.uint8, device=t.device)
                      for t in tensors(self.same)]  # fmt: skip
            del filled
            found = self.errors(run())
            errors += found
            ratios += [e / b if b else (0.0 if e == 0 else math.inf)
                       for e, b in zip(found, self.budgets, strict=True)]  # fmt: skip
        return float(np.max(ratios)), float(np.max(errors))  # NaN if any is NaN


def largest_error(actual: Tensor, exact: Tensor) -> float:
    """max |actual − exact| / max |exact| in float64, infinite for another shape; NaN stays NaN."""
    if actual.shape != exact.shape:
        return math.inf
    difference = (actual.double() - exact.double()).abs().max()
    return (difference / exact.double().abs().max().clamp(min=1e-300)).item()


def tensors(result: Any) -> tuple[Tensor, ...]:
    """An operator's result as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _double(argument: Any) -> Any:
    floating = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.double() if floating else argument


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
) -> None:
    """Add a row for every case and contender to the report. If ``ceilings`` is None, nothing is
    timed and opponents are left out."""
    progress = progress or Progress(quiet=True)
    for case in cases:
        progress.stage(case.title)
        if budget.left() <= 0:
            report["rows"].append(_row(case, "all") | _skipped("no time was left"))
        else:
            try:
                others = {} if ceilings is None else opponents(case, device)
                rows = rows_of(case, device, rounds, ceilings, others)
            except Exception as broken:  # the reference, say; other operators are still measured
                rows = [_row(case, "all") | failed(broken)]
            report["rows"] += rows
        keep()
        progress.done()


def rows_of(
    case: Case,
    device: torch.device,
    rounds: int,
    ceilings: Ceilings | None,
    others: Mapping[str, Make],
) -> list[Row]:
    """Check all contenders, and with ceilings time those that passed if one of ours did."""
    target = Target(case, case.inputs(device))
    ours, runs = implementations(case, device), dict[str, Run]()
    rows = [_check(target, name, make, "subject", runs) for name, make in ours.items()]
    rows += [_check(target, name, make, "peer", runs) for name, make in others.items()]
    if ceilings is not None and runs.keys() & ours.keys():
        samples = interleave(runs, rounds, device=device, visit_ms=0, pause_s=0, warmup=2,
                             seconds=TIMING_SECONDS)  # fmt: skip
        moved = least_traffic(target.arguments, tensors(target.same))
        for row in rows:
            if row["status"] == "ok":
                row |= figures(case, row["contender"], samples, moved, ceilings)
    return rows


def _check(target: Target, name: str, make: Make, role: str, runs: dict[str, Run]) -> Row:
    """The row of one contender. Its function is added to ``runs`` if its outputs are right."""
    row = _row(target.case, name, role)
    allowed = ERROR_RATIO if role == "subject" else OPPONENT_RATIO
    try:
        run = make(*target.arguments)
        found, error = target.worst(run)
    except (Unavailable, ImportError) as reason:
        return row | _skipped(reason)
    except Exception as broken:  # whatever a kernel may die of, the others are still measured
        return row | failed(broken) | ({"status": "skipped"} if role == "peer" else {})
    row |= {"error": error, "error_over_reference": found}
    if not found <= allowed:
        reason = f"error {error:.3g} is {found:.3g} times the reference's, allowed is {allowed:g}"
        return row | {"status": "wrong", "reason": reason}
    runs[name] = run
    return row | {"status": "ok"}


def figures(
    case: Case, name: str, samples: Mapping[str, Sequence[float]], moved: int, ceilings: Ceilings
) -> Row:
    """Milliseconds, rate, percentage of the ceiling, and the speed-up over each other contender."""
    taken = spread(samples[name])
    if case.flops:
        kind = case.operator.removeprefix("linear_")
        numbers = kind if kind in ("int8", "fp8") else "bf16"
        rate, unit = case.flops / taken.median / 1e9, "TFLOP/s"
        ceiling = ceilings.matmul_tflop_s.get(numbers)
    else:
        rate, unit, ceiling = moved / taken.median / 1e6, "GB/s", ceilings.copy_gb_s
    return {
        "ms": vars(taken), "flops": case.flops, "bytes": moved, "rate": rate, "unit": unit,
        "percent_of_ceiling": None if ceiling is None else 100 * rate / ceiling,
        "speedup_over": {other: ratio(samples[other], samples[name]).median
                         for other in samples if other != name},
    }  # fmt: skip


def least_traffic(arguments: Iterable[Any], outputs: Iterable[Tensor]) -> int:
    """Bytes if every argument is read once and every output written once."""
    return sum(t.nbytes for t in (*arguments, *outputs) if isinstance(t, Tensor))


def _row(case: Case, name: str, role: str = "subject") -> Row:
    return {"section": "operator", "case": case.title, "contender": name, "role": role,
            "operator": case.operator, "shape": case.shape, "dtype": "bf16"}  # fmt: skip


def _skipped(reason: object) -> Row:
    return {"status": "skipped", "reason": one_line(reason)[:300]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", help="cpu or cuda; CUDA where there is one unless given")
    add("--minutes", type=float, default=5.0, help="what is not measured by then is skipped; "
        "with --json, up to half of it may be a wait for an idle CPU")  # fmt: skip
    add("--rounds", type=positive, default=30, help="samples of each function")
    add("--only", default="", help="operators whose names contain this")
    add("--wide", action="store_true", help="all columns, wider than the terminal")
    add("--json", type=Path, metavar="FILE", help="write every figure here")


def run(arguments: argparse.Namespace) -> int:
    from dit_bench.outputs import check_outputs

    device, rounds = parse_device(arguments.device), arguments.rounds
    cases = [case for case in all_cases(device) if arguments.only in case.operator]
    if not cases:
        raise ValueError(f"--only {arguments.only!r} is part of no operator's name")
    if not 0 < arguments.minutes < math.inf:
        raise ValueError(f"minutes {arguments.minutes:g} is not a finite number above 0")
    check_outputs([arguments.json])
    budget = Budget(60 * arguments.minutes)
    settings = {"minutes": arguments.minutes, "rounds": rounds}
    report = new_report("operators", describe(device), settings, arguments.given)
    if device.type == "cpu" and arguments.json is not None:
        settle(print, min(SETTLE_S, WAIT_SHARE * budget.left()))
    report["load_average"] = load_average()

    def fill(progress: Progress, keep: Callable[[], object]) -> None:
        others = OtherLoad(known=device.type == "cpu")  # it does not count a GPU's work
        with torch.inference_mode(), progress.run(len(cases)):
            ceilings = measure_ceilings(device)
            report["ceilings"] = vars(ceilings)
            with others.sampled():
                measure(cases, report, device, budget, ceilings, rounds=rounds,
                        progress=progress, keep=keep)  # fmt: skip
        report["other_load"] = others.mean

    return carry_out(report, fill, arguments)
