"""Rows of figures: who computed what how quickly, and how far from float32 eager.

A row is one contender on one piece of work ("forward", "step", "decode", "image") for N images.
Contenders on the same work take turns; times are quantiles over rounds, ratios are taken within
a round. Where a time spreads by more than `NOISE_BOUND`, no one is called quicker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_bench.ceilings import Ceilings
from dit_bench.cpu_timing import interleave_visits
from dit_bench.load import OtherLoad
from dit_bench.peers import Built, Peer, allowed_error, build_peers
from dit_bench.progress import LEAST_ROUNDS, Progress
from dit_bench.timing import Interleaved, Spread, interleave
from dit_engine.backends import PRECISIONS

NOISE_BOUND = 0.25
"""(p95 − p5) / median of a contender's times, above which they are noise."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """role: "subject", "peer", or "other network", which is another function of other inputs.

    precision: of its numbers. checked: whether its result is compared with float32 eager; check:
    how, where it is another way than by the task's ``expected`` (`dit_bench.peers.Peer`).
    """

    name: str
    role: str
    precision: str
    build: Callable[[], Callable[[], Any]]
    checked: bool = True
    check: Callable[[Any], tuple[float, float]] | None = None
    flops: int = 0
    weight_bytes: int = 0


@dataclass
class Task:
    """One piece of work: what it is called, who does it, and what comes out in float32 (None where
    every contender has a check of its own)."""

    model: str
    what: str
    images: int
    contenders: Sequence[Contender]
    expected: Tensor | None
    bf16_error: float = 0.0
    note: str = ""


@dataclass
class Timer:
    """How long to time, and what the results are held against."""

    device: torch.device
    rounds: int
    seconds: float
    ceilings: Ceilings
    progress: Progress = field(default_factory=lambda: Progress(quiet=True))
    load: OtherLoad = field(default_factory=OtherLoad)

    def run(self, task: Task) -> tuple[list[Row], Built]:
        """Build, check and time; a row for each contender, also for those that were left out."""
        peers = [
            Peer(c.name, c.precision if c.checked else None, c.build, c.check)
            for c in task.contenders
        ]
        bounds = {p: allowed_error(p, task.bf16_error) for p in PRECISIONS}
        built = build_peers(peers, task.expected, task.bf16_error, self.progress.say, bounds=bounds)
        times = self._times(built, f"{task.model} {task.what}, {task.images}")
        subject = next((c.name for c in task.contenders if c.role == "subject"), None)
        rows = [self._row(task, contender, built, times) for contender in task.contenders]
        if times is not None and subject is not None and subject in times.samples_ms:
            own = next(row for row in rows if row["name"] == subject)
            for row in rows:
                if row["status"] == "ok" and row["name"] != subject:
                    row["ratio"] = _spread(times.ratio_spread(row["name"], subject))
                    row["verdict"] = verdict(row, own)
        return rows, built

    def _times(self, built: Built, name: str) -> Interleaved | None:
        if not built.functions:
            return None
        with self.progress.rounds(self.rounds, name, self.seconds) as go_on, self.load.sampled():
            if self.device.type == "cuda":
                return interleave(built.functions, self.rounds, device=self.device, go_on=go_on)
            return interleave_visits(built.functions, self.rounds, go_on=go_on)

    def _row(
        self, task: Task, contender: Contender, built: Built, times: Interleaved | None
    ) -> Row:
        record = built.records[contender.name]
        row: Row = {
            "model": task.model,
            "what": task.what,
            "images": task.images,
            "name": contender.name,
            "role": contender.role,
            "precision": contender.precision,
            "status": "ok",
        }
        if "setup_s" in record and "build_s" in record:
            row["setup_s"] = record["setup_s"]
            row["first_call_s"] = max(0.0, round(record["build_s"] - record["setup_s"], 3))
        row |= {key: record[key] for key in ("error", "bound") if key in record}
        if (reason := built.reason(contender.name)) is not None:
            return row | {"status": "wrong" if "error" in record else "skipped", "reason": reason}
        assert times is not None
        taken = times.spread(contender.name)
        row["samples_ms"] = [round(ms, 4) for ms in times.samples_ms[contender.name]]
        row["ms"] = _spread(taken)
        row["noisy"] = noisy(taken)
        row["other_load"] = self.load.last
        row["images_s"] = 1e3 * task.images / taken.median
        if contender.flops:
            row |= {
                "gflops": contender.flops / 1e9,
                "tflop_s": contender.flops / taken.median / 1e9,
            }
        if contender.flops and contender.weight_bytes:
            row["flops_per_byte"] = contender.flops / contender.weight_bytes
        return row | shares(row, self.ceilings)


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
    ratio = row["ratio"]
    if ratio["p5"] > 1:
        return f"{own['name']} is {ratio['median']:.2f}× as quick"
    if ratio["p95"] < 1:
        return f"{row['name']} is {1 / ratio['median']:.2f}× as quick"
    return "no difference shown"


def _spread(found: Spread) -> dict[str, float | int]:
    return {"p5": found.p5, "median": found.median, "p95": found.p95, "n": found.n}
