"""Rows of figures: the time of each contender, and its error against float32 eager.

A row is one contender on one piece of work for N images. Contenders on the same work take turns;
times are quantiles over rounds, ratios are taken within a round. If a time spreads by more than
`NOISE_BOUND`, no contender is called quicker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dit_bench.ceilings import Ceilings
from dit_bench.contenders import Contender, Function, bf16_eager, build, relative_error
from dit_bench.load import OtherLoad
from dit_bench.progress import LEAST_ROUNDS, Progress
from dit_bench.report import Row
from dit_bench.timing import Budget, Spread, interleave, ratio, spread

NOISE_BOUND = 0.25
"""(p95 − p5) / median of a contender's times, above which they are noise."""


@dataclass
class Timer:
    """How long to time, and the ceilings with which results are compared."""

    device: torch.device
    rounds: int
    seconds: float
    ceilings: Ceilings | None = None
    progress: Progress = field(default_factory=lambda: Progress(quiet=True))
    load: OtherLoad = field(default_factory=OtherLoad)
    budget: Budget | None = None
    """What is not begun by its end is skipped."""

    def run(
        self,
        work: Row,
        contenders: Sequence[Contender],
        expected: Tensor | None = None,
        bf16_error: float = 0.0,
    ) -> list[Row]:
        """Build, check and time; a row for each contender, also for those that were left out.

        Args:
            work: what the rows have in common: "section", "case", "images" and so on.
            expected: the result of float32 eager; None if every contender has its own check.
            bf16_error: the relative error of bfloat16 eager.
        """
        built = build(contenders, expected, bf16_error, self.progress.say, self.device,
                      self.budget)  # fmt: skip
        samples: dict[str, list[float]] = {}
        if built.functions:
            go_on = self.progress.rounds(self.seconds)
            with self.load.sampled():
                # Under torch.compile, CUDA graphs are recorded at the second call.
                warmup = 2 if self.device.type == "cuda" else 0
                samples = interleave(built.functions, self.rounds, device=self.device,
                                     warmup=warmup, go_on=go_on)  # fmt: skip
        rows: list[Row] = []
        for one in contenders:
            who = {"contender": one.name, "role": one.role, "precision": one.precision}
            rows.append(work | who | built.records[one.name])
            if one.name in samples:
                rows[-1] |= self._figures(rows[-1], one, samples[one.name])
        own = next((row for row in rows if row["role"] == "subject" and "ms" in row), None)
        if own is None:
            return rows
        for row in rows:
            if "ms" in row and row is not own and row["role"] != "part":
                theirs = samples[row["contender"]]
                row["ratio"] = quantiles(ratio(theirs, samples[own["contender"]]))
                row["verdict"] = verdict(row, own)
        return rows

    def _figures(self, row: Row, contender: Contender, samples: list[float]) -> Row:
        taken = spread(samples)
        found: Row = {
            "samples_ms": [round(ms, 4) for ms in samples], "ms": vars(taken),
            "noisy": noisy(taken), "other_load": self.load.last,
            "images_s": 1e3 * row["images"] / taken.median,
        }  # fmt: skip
        if contender.flops:
            found["gflops"] = contender.flops / 1e9
            found["tflop_s"] = contender.flops / taken.median / 1e9
            if contender.weight_bytes:
                found["flops_per_byte"] = contender.flops / contender.weight_bytes
        return found if self.ceilings is None else found | shares(row | found, self.ceilings)


def reference(
    run: Callable[[str, str], Function], contenders: Sequence[Contender]
) -> tuple[Tensor, float]:
    """The result of float32 eager, and the relative error of bfloat16 eager if it is needed.

    run: backend and precision → the function.
    """
    with torch.inference_mode():
        expected = run("eager", "fp32")()
        if all(contender.precision == "fp32" for contender in contenders):
            return expected, 0.0

        def error(precision: str) -> float:
            return relative_error(run("eager", precision)(), expected)

        return expected, bf16_eager(error, expected.device)


def quantiles(found: Spread) -> dict[str, float]:
    return {"p5": found.p5, "median": found.median, "p95": found.p95}


def shares(row: Row, ceilings: Ceilings) -> Row:
    """The reached rates of arithmetic and of reading the weights once, beside the ceilings.

    FLOPs are the network's, whether or not a backend computed the conditioning beforehand.
    """
    found: Row = {}
    if "tflop_s" not in row:
        return found
    ceiling = ceilings.matmul_tflop_s.get(row["precision"])
    if ceiling is not None:
        found["percent_of_matmul"] = 100 * row["tflop_s"] / ceiling
    if "flops_per_byte" in row:
        traffic = 1e3 * row["tflop_s"] / row["flops_per_byte"]  # GB/s
        found["percent_of_copy"] = 100 * traffic / ceilings.copy_gb_s
        if ceiling is not None:
            ridge = 1e3 * ceiling / ceilings.copy_gb_s  # FLOPs per byte
            found["bound_by"] = "memory" if row["flops_per_byte"] < ridge else "arithmetic"
    return found


def noisy(taken: Spread) -> bool:
    """Whether times spread by more than the bound, or are too few to tell."""
    return taken.n < LEAST_ROUNDS or (taken.p95 - taken.p5) / taken.median > NOISE_BOUND


def verdict(row: Row, own: Row) -> str:
    """What the interleaved rounds say about ``row``'s time over that of ``own``, the subject."""
    if row["role"] == "other network":
        return "another network"
    if row["noisy"] or own["noisy"]:
        return "noisy: no verdict"
    found = row["ratio"]
    if found["p5"] > 1:
        return f"{own['contender']} is {found['median']:.2f}× as quick"
    if found["p95"] < 1:
        return f"{row['contender']} is {1 / found['median']:.2f}× as quick"
    return "no difference shown"
