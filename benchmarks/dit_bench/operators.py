"""Checks the operators of dit_kernels against float64, then times those that pass.

``python -m dit_bench.operators --device cpu`` prints a line an operator and shape: the median, the
rate, its percentage of the ceiling measured in the same run, and the speed-up over what a plain
torch model runs and over torch.compile. An implementation passes with at most twice the error of
the torch reference in the same dtype; an opponent whose output is wrong is not timed either.

On a CPU arguments stay in the caches where they fit, so that more than 100 % of the rate of a
large copy is possible; on CUDA the caches are overwritten before every sample.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported
    from dit_engine.first import leave_out_of_path

    leave_out_of_path()
    from dit_engine.console.run import wait_briefly

    wait_briefly()

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_bench.budget import Budget
from dit_bench.ceilings import NAMES, Ceilings, measure_ceilings
from dit_bench.gpu_environment import describe_environment
from dit_bench.gpu_report import Report, check_report_path, failure, skipped
from dit_bench.hardware import SETTLE_S, load_average, settle
from dit_bench.load import OtherLoad, warning
from dit_bench.operator_cases import Case, all_cases
from dit_bench.operator_checks import DeviceLost, Target, check_device, tensors
from dit_bench.operator_contenders import Find, implementations, opponents, third_party
from dit_bench.timing import Interleaved, interleave
from dit_engine.console.parser import Parser
from dit_engine.console.run import entry, run_command
from dit_engine.io.printable import say
from dit_engine.runtime import parse_device

ERROR_RATIO = 2.0
"""An implementation's error against float64 over the same-dtype reference's, at most."""
OPPONENT_RATIO = 20.0
"""The same for opponents, who need not round as carefully: beyond it their output is wrong."""
TIMING_SECONDS = 3.0
WAIT_SHARE = 0.5
"""Of the minutes that were asked for, at most so much is spent on waiting for an idle machine."""

Run = Callable[..., Any]
Row = dict[str, Any]


@dataclass
class OperatorBenchmark:
    """Records a row for every case and contender in ``report``'s section "operators".

    Attributes:
        impls: the operators' implementations by name; those that the device could have by default.
        opposed: whether the timed cases meet their opponents.
        rounds: samples of each function.
    """

    report: Report
    device: torch.device
    budget: Budget
    ceilings: Ceilings
    impls: Sequence[str] | None = None
    opposed: bool = True
    rounds: int = 30

    def run(self, cases: Iterable[Case]) -> None:
        """Raises `DeviceLost` where nothing more could be measured."""
        for case in cases:
            for row in self._rows(case):
                self.report.record("operators", row)

    def run_third_party(self, cases: Iterable[Case]) -> None:
        """Other packages' kernels of the timed cases, beside ours once more, which are not recorded
        again. To be run last: a kernel of theirs may lose the device."""
        for case in cases:
            asked = third_party(case, self.device) if case.timed and self.opposed else {}
            others = {
                name: run for name, find in asked.items() if (run := self._there(case, name, find))
            }
            try:
                rows = self._rows(case, others) if others else []
            except DeviceLost as lost:
                self.report.record("operators", _row(case, "third party") | skipped(lost))
                return
            for row in rows:
                if row.get("opponent") or row["status"] == "skipped":
                    self.report.record("operators", row)

    def _there(self, case: Case, name: str, find: Find) -> Find | None:
        """``find`` of another package's kernel; None, and a row, for one that is not installed: no
        reference is computed for it."""
        try:
            run = find()
        except Exception as reason:
            row = _row(case, name) | skipped(reason) | {"opponent": True}
            self.report.record("operators", row)
            return None
        return lambda: run

    def _rows(self, case: Case, others: Mapping[str, Find] | None = None) -> list[Row]:
        """Rows of our implementations and of ``others``; None: of the case's opponents."""
        if self.budget.left() <= 0:
            return [_row(case, name) | skipped("time budget") for name in others or ["all"]]
        if others is None:
            others = opponents(case, self.device) if case.timed and self.opposed else {}
        target = Target(case, case.inputs(self.device))
        passed: dict[str, Run] = {}
        found = implementations(case, self.device, self.impls)
        rows = [
            self._check(target, name, find, ERROR_RATIO, passed) for name, find in found.items()
        ]
        for name, find in others.items():
            row = self._check(target, name, find, OPPONENT_RATIO, passed)
            if row["status"] == "failed":  # theirs to mend
                row |= skipped(f"opponent: {row['reason']}")
            rows.append(row | {"opponent": True})
        if case.timed and passed:
            self._time(target, passed, rows)
        return rows

    def _check(
        self,
        target: Target,
        name: str,
        find: Callable[[], Run],
        ratio: float,
        passed: dict[str, Run],
    ) -> Row:
        """The row of one contender; it joins ``passed`` if its outputs are right."""
        from dit_kernels import Unavailable

        case, row = target.case, _row(target.case, name)
        try:
            run = find()
            found, error = target.worst(run)
        except (Unavailable, ImportError) as reason:
            return row | skipped(reason)
        except Exception as broken:  # whatever a kernel may die of, the others are still measured
            check_device(self.device, f"{case.operator} {case.shape}, {name}")
            return row | failure(broken)
        row |= {"error": error, "error_over_reference": found}
        if not found <= ratio:
            reason = f"error {error:.3g} is {found:.3g} times the reference's, allowed is {ratio:g}"
            return row | {"status": "failed", "reason": reason}
        passed[name] = run
        return row | {"status": "ok"}

    def _time(self, target: Target, passed: dict[str, Run], rows: list[Row]) -> None:
        """Add times, rates and ratios to the rows of those that passed."""
        arguments = target.arguments
        calls = {name: _bound(run, arguments) for name, run in passed.items()}
        try:
            taken = interleave(calls, self.rounds, device=self.device, warmup=2,
                               seconds=TIMING_SECONDS)  # fmt: skip
        except Exception as broken:
            check_device(self.device, f"the timing of {target.case.operator} {target.case.shape}")
            for row in rows:
                if row["impl"] in passed:
                    row |= failure(broken)
            return
        moved = least_traffic(arguments, tensors(target.same))
        for row in rows:
            if row["impl"] in passed:
                row |= figures(target.case, row["impl"], taken, moved, self.ceilings)


def figures(case: Case, name: str, taken: Interleaved, moved: int, ceilings: Ceilings) -> Row:
    """Milliseconds, rate, percentage of the ceiling, and how often as quick as each other."""
    ms = taken.ms(name)
    if case.flops:
        kind = case.operator.removeprefix("linear_")
        numbers = kind if kind in ("int8", "fp8") else NAMES[case.dtype]
        rate, unit = case.flops / ms.median / 1e9, "TFLOP/s"
        ceiling = ceilings.matmul_tflop_s.get(numbers)
    else:
        rate, unit, ceiling = moved / ms.median / 1e6, "GB/s", ceilings.copy_gb_s
    others = [other for other in taken.samples_ms if other != name]
    return {
        "ms": {"q10": ms.low, "median": ms.median, "q90": ms.high},
        "rounds": taken.rounds,
        "flops": case.flops,
        "bytes": moved,
        "rate": rate,
        "unit": unit,
        "percent_of_ceiling": None if ceiling is None else 100 * rate / ceiling,
        "speedup_over": {other: taken.ratio(other, name).median for other in others},
    }


def least_traffic(arguments: Iterable[Any], outputs: Iterable[Tensor]) -> int:
    """Bytes if every argument is read once and every output written once."""
    read = [a for a in arguments if isinstance(a, Tensor)]
    return sum(t.numel() * t.element_size() for t in (*read, *outputs))


def _bound(run: Run, arguments: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: run(*arguments)


def _row(case: Case, name: str) -> Row:
    return {"operator": case.operator, "shape": case.shape, "dtype": NAMES[case.dtype],
            "impl": name}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("python -m dit_bench.operators", "Check the operators, then time them.")
    add = parser.add_argument
    add("--device", help="cpu or cuda; CUDA where there is one unless given")
    add("--minutes", type=float, default=5.0, help="what is not measured by then is skipped; "
        "with --json, up to half of it may be a wait for an idle CPU")  # fmt: skip
    add("--rounds", type=int, default=30, help="samples of each function")
    add("--only", default="", help="operators whose names contain this")
    add("--wide", action="store_true", help="all columns, wider than the terminal")
    add("--json", type=Path, help="write every figure here")
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> int:
    from dit_bench.gpu_table import WIDTH, failure_lines, operator_lines
    from dit_bench.show.tables import fold, narrower_than

    arguments = build_parser().parse_args(argv)

    def command() -> int:
        device = parse_device(arguments.device)
        cases = [case for case in all_cases(device) if arguments.only in case.operator]
        if not cases:
            raise ValueError(f"--only {arguments.only!r} is part of no operator's name")
        check_report_path(arguments.json)
        if not 0 < arguments.minutes < math.inf:
            raise ValueError(f"minutes {arguments.minutes:g} is not a finite number above 0")
        budget = Budget(60 * arguments.minutes)
        if device.type == "cpu" and arguments.json is not None:
            settle(print, min(SETTLE_S, WAIT_SHARE * budget.left()))
        about = {"environment": describe_environment(device), "load_average": load_average()}
        report = Report(arguments.json, about)
        others = OtherLoad(known=device.type == "cpu")  # what a GPU does is not in it
        with torch.inference_mode():
            ceilings = measure_ceilings(device)
            report.put("ceilings", vars(ceilings))
            benchmark = OperatorBenchmark(report, device, budget, ceilings)
            benchmark.rounds = arguments.rounds
            with others.sampled():
                benchmark.run(cases)
                benchmark.run_third_party(cases)
        report.put("other_load", others.mean)
        report.put("complete", True)
        report.finish()
        short = narrower_than(WIDTH) and not arguments.wide
        lines = operator_lines(report.values, short) + failure_lines(report.values)
        if (busy := warning(report.values)) is not None:
            lines.append(busy)
        text = "\n".join(lines)
        say(text if arguments.wide else fold(text))
        return 1 if report.failed else 0

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
