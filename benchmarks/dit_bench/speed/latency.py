"""Rows of figures: who computed what how quickly, and how far from float32 eager.

A row is one contender on one piece of work for N images. Contenders on the same work take turns;
times are quantiles over rounds, ratios are taken within a round. Where a time spreads by more than
`NOISE_BOUND`, no one is called quicker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dit_bench.ceilings import Ceilings
from dit_bench.contenders import Built, Contender, build
from dit_bench.load import OtherLoad
from dit_bench.progress import LEAST_ROUNDS, Progress
from dit_bench.report import Row
from dit_bench.timing import Spread, interleave, ratio, spread

NOISE_BOUND = 0.25
"""(p95 − p5) / median of a contender's times, above which they are noise."""


@dataclass
class Task:
    """One piece of work: what it is, who does it, and what comes out in float32 (None where every
    contender has a check of its own)."""

    section: str
    model: str
    images: int
    contenders: Sequence[Contender]
    expected: Tensor | None
    bf16_error: float = 0.0

    @property
    def case(self) -> str:
        return f"{self.model}, batch {self.images}"


@dataclass
class Timer:
    """How long to time, and what the results are held against."""

    device: torch.device
    rounds: int
    seconds: float
    ceilings: Ceilings | None = None
    progress: Progress = field(default_factory=lambda: Progress(quiet=True))
    load: OtherLoad = field(default_factory=OtherLoad)

    def run(self, task: Task) -> tuple[list[Row], Built]:
        """Build, check and time; a row for each contender, also for those that were left out."""
        built = build(task.contenders, task.expected, task.bf16_error, self.progress.say)
        samples: dict[str, list[float]] = {}
        if built.functions:
            name = f"{task.case}: {task.section}"
            rounds = self.progress.rounds(self.rounds, name, self.seconds)
            with rounds as go_on, self.load.sampled():
                samples = interleave(built.functions, self.rounds, device=self.device, go_on=go_on)
        rows = [self._row(task, contender, built, samples) for contender in task.contenders]
        subject = next((row for row in rows if row["role"] == "subject"), None)
        if subject is not None and subject["status"] == "ok":
            own = subject["contender"]
            for row in rows:
                if row["status"] == "ok" and row is not subject and row["role"] != "part":
                    row["ratio"] = quantiles(ratio(samples[row["contender"]], samples[own]))
                    row["verdict"] = verdict(row, subject)
        return rows, built

    def _row(
        self, task: Task, contender: Contender, built: Built, samples: dict[str, list[float]]
    ) -> Row:
        row: Row = {
            "section": task.section, "case": task.case, "contender": contender.name,
            "model": task.model, "images": task.images, "role": contender.role,
            "precision": contender.precision, "status": "ok", **built.records[contender.name],
        }  # fmt: skip
        if "reason" in row:
            return row | {"status": "wrong" if "error" in row else "skipped"}
        taken = spread(samples[contender.name])
        row |= {
            "samples_ms": [round(ms, 4) for ms in samples[contender.name]],
            "ms": vars(taken), "noisy": noisy(taken), "other_load": self.load.last,
            "images_s": 1e3 * task.images / taken.median,
        }  # fmt: skip
        if contender.flops:
            row |= {
                "gflops": contender.flops / 1e9,
                "tflop_s": contender.flops / taken.median / 1e9,
            }
            if contender.weight_bytes:
                row["flops_per_byte"] = contender.flops / contender.weight_bytes
        return row | ({} if self.ceilings is None else shares(row, self.ceilings))


def quantiles(found: Spread) -> dict[str, float]:
    return {"p5": found.p5, "median": found.median, "p95": found.p95}


def shares(row: Row, ceilings: Ceilings) -> Row:
    """Achieved arithmetic and, of one pass over the weights, traffic, beside the ceilings.

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
            ridge = 1e3 * ceiling / ceilings.copy_gb_s  # FLOPs a byte
            found["bound_by"] = "memory" if row["flops_per_byte"] < ridge else "arithmetic"
    return found


def noisy(taken: Spread) -> bool:
    """Whether times spread by more than the bound, or are too few to tell."""
    return taken.n < LEAST_ROUNDS or taken.relative > NOISE_BOUND


def verdict(row: Row, own: Row) -> str:
    """What the interleaved rounds say of ``row``'s time over that of ``own``, the subject."""
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
