"""``dit-bench cpu``: the lean forward on this CPU beside its peers, as ratios from one run.

It compares DiT-XL/2 at 256 px, DiT-S/2, the built-in model and the VAE's decoder with diffusers,
OpenVINO and torch.compile on the same weights and inputs. Ratios mean something on an idle machine
only: the load is recorded. ``--profile`` tells where the lean forward's time goes instead, and
``--busy 1`` what another program's work costs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dit_bench.machine import cpu_model, describe, settle, slug
from dit_bench.options import check_threads, positive
from dit_bench.progress import Progress
from dit_bench.report import Report, Row, new_report
from dit_bench.speed.busy import busy_rows
from dit_bench.speed.forward import STEPS, Work
from dit_bench.speed.latency import Timer, quantiles
from dit_bench.speed.memory import measure as measure_memory
from dit_bench.speed.models import Plan, measure
from dit_bench.speed.profile import Linears, profile_row
from dit_bench.subjects import in_numerics, load_subject
from dit_bench.timing import ratio
from dit_engine.io.printable import one_line
from dit_kernels.quantized import quantized_why_not

# Models with the batches that they are measured at; then what is measured otherwise.
BATCHES = {"XL/2": (2,), "S/2": (2, 16), "builtin": (2, 16)}
WORKLOADS = (*BATCHES, "vae", "memory")
BUSY_WORKLOADS = {"builtin": (2, 16), "S/2": (2,)}
SUBJECT = ("lean", "bf16")
# Of max-autotune it is known that, frozen, it takes minutes and settles on the same products, and
# that otherwise it changes nothing here.
PEERS = (("lean", "int8"), ("openvino", "bf16"), ("compile", "bf16"), ("compile frozen", "bf16"),
         ("diffusers", "fp32"), ("diffusers", "bf16"), ("eager", "bf16"))  # fmt: skip
BUSY_PEERS = (("lean", "int8"), ("openvino", "bf16"), ("diffusers", "bf16"))
# Ours over theirs, and the largest ratio that is a "pass" for DiT-XL/2 at 256 px and batch 2. A
# name may begin several names ("compile"): the quickest of these is meant.
GOALS = (
    ("lean bf16", "diffusers bf16", 0.50),
    ("lean bf16", "openvino bf16", 0.66),
    ("lean bf16", "compile", 0.53),
    ("lean int8", "diffusers bf16", 0.33),
    ("lean bf16", "diffusers fp32", 0.13),
    ("lean bf16", "linears alone", 1.25),
)
DECODE_GOALS = (("lean bf16", "openvino bf16", 0.85), ("lean bf16", "diffusers bf16", None))
MEMORY_GOAL = 1.15
ROUNDS, QUICK_ROUNDS = 15, 3
RESULTS = Path(__file__).parents[2] / "results"


def _linears(work: Work) -> Callable[[], Any]:
    return Linears(lean_transformer(work, "bf16"), work.images).all


PARTS = (
    ("lean bf16 start", lambda work: work.start("lean", "bf16")),
    ("lean int8 start", lambda work: work.start("lean", "int8")),
    ("linears alone", _linears),
)


def lean_transformer(work: Work, precision: str) -> Any:
    """The one that the lean forward runs, with its packed weights."""
    backend: Any = work.networks.backend("lean", precision)
    return backend.transformer


def plans(arguments: argparse.Namespace) -> list[Plan]:
    """The forwards and the decode that are measured, in order."""
    quick = arguments.quick
    common: dict[str, Any] = {
        "device": torch.device("cpu"), "subject": SUBJECT, "seconds": math.inf,
        "rounds": arguments.rounds or (QUICK_ROUNDS if quick else ROUNDS),
        "threads": arguments.threads, "half_null": True,
    }  # fmt: skip
    chosen = arguments.only or (["S/2"] if quick else WORKLOADS)
    peers = tuple(peer for peer in PEERS if not (quick and peer[0] == "compile frozen"))
    found = [
        Plan((name,), peers=peers, batches=batches[:1] if quick else batches, kinds=("forward",),
             parts=PARTS, **common)
        for name, batches in BATCHES.items() if name in chosen
    ]  # fmt: skip
    if "vae" in chosen:  # of any model: this one is made quickly
        found.append(Plan(("S/8",), title="VAE, 256 px", peers=(PEERS[1], PEERS[5], PEERS[6]),
                          kinds=("decode",), **common))  # fmt: skip
    return found


def ratio_rows(rows: Sequence[Row]) -> list[Row]:
    """The ratios of every case; goals belong to XL/2's forward and to the decoder."""
    found = []
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        decode = own[0]["section"] == "decode"
        for ours, theirs, goal in DECODE_GOALS if decode else GOALS:
            here = goal if decode or own[0]["model"] == "XL/2" else None
            found.append(ratio_row(case, own, ours, theirs, here))
    return found


def ratio_row(case: str, rows: Sequence[Row], ours: str, theirs: str, goal: float | None) -> Row:
    """One ratio, each taken within its round, with both medians in milliseconds.

    "conditioned" is the ratio with the hoisted conditioning spread over `STEPS` steps and added to
    ours: peers compute theirs within each forward, except OpenVINO's, which has none there.
    """
    found: Row = {"case": case, "ours": ours, "theirs": theirs, "goal": goal}
    chosen = []
    for name in (ours, theirs):
        asked = [r for r in rows if f"{r['contender']} ".startswith(f"{name} ")
                 and not r["contender"].endswith(" start")]  # fmt: skip
        timed = [row for row in asked if row["status"] == "ok"]
        if not timed:
            why = "; ".join(row["reason"] for row in asked) or "not asked for"
            return found | {"reason": f"{name}: {why}", "result": "skipped"}
        chosen.append(min(timed, key=lambda row: row["ms"]["median"]))
    one, other = chosen
    taken = ratio(one["samples_ms"], other["samples_ms"])
    found |= {
        "theirs": other["contender"], "ratio": quantiles(taken),
        "ours_ms": one["ms"]["median"], "theirs_ms": other["ms"]["median"],
        "result": result(taken.median, goal),
    }  # fmt: skip
    whole = other["role"] != "part" and not other["contender"].startswith("openvino")
    if (hoisted := one.get("conditioning_ms")) is not None and whole:
        found["conditioned"] = taken.median * (1 + hoisted / STEPS / found["ours_ms"])
    return found


def add_conditioning(rows: Sequence[Row]) -> None:
    """What lean computes once before its `STEPS` steps: its start less an ordinary step."""
    medians = {(r["case"], r["contender"]): r["ms"]["median"] for r in rows if "ms" in r}
    for row in rows:
        start = medians.get((row["case"], f"{row['contender']} start"))
        if start is not None and "ms" in row:
            row["conditioning_ms"] = max(0.0, start - row["ms"]["median"])


def result(value: float, goal: float | None) -> str:
    """ "pass" at or under the goal, "miss" above it, "" without one."""
    if goal is None:
        return ""
    return "pass" if value <= goal else "miss"


def memory_row(name: str, threads: int) -> Row:
    """Resident memory of the lean forward, in a child process."""
    goal = MEMORY_GOAL if name == "XL/2" else None
    row: Row = {"section": "memory", "case": f"{name}, batch 2", "contender": "lean bf16",
                "goal": goal}  # fmt: skip
    model = in_numerics(load_subject(name, with_vae=False).model, "diffusers")
    try:
        found = measure_memory(model, 2, "bf16", threads)
    except (RuntimeError, ValueError) as error:
        return row | {"status": "skipped", "reason": one_line(error), "result": "skipped"}
    return row | {"status": "ok", **found, "result": result(found["value"], goal)}


def works(
    arguments: argparse.Namespace, batches: Mapping[str, tuple[int, ...]], usual: list[str]
) -> Iterator[tuple[str, Work]]:
    """The chosen models at their batches, one after the other."""
    from dit_bench.speed.forward import Networks
    from dit_engine.engine import Engine

    for name in arguments.only or usual:
        model = in_numerics(load_subject(name, with_vae=False).model, "diffusers")
        networks = Networks(Engine(model, device="cpu"))
        for batch in batches[name]:
            yield f"{name}, batch {batch}", Work(networks, batch, half_null=True)


def fill_profile(arguments: argparse.Namespace, report: Report, timer: Timer) -> None:
    batches = dict.fromkeys(BATCHES, (2,))
    for case, work in works(arguments, batches, ["S/2" if arguments.quick else "XL/2"]):
        for precision in ("bf16", "int8"):
            row: Row = {"section": "profile", "case": case, "contender": f"lean {precision}"}
            if precision == "int8" and (why := quantized_why_not("int8", torch.device("cpu"))):
                report["rows"].append(row | {"status": "skipped", "reason": why})
                continue
            transformer = lean_transformer(work, precision)
            forward = work.forward("lean", precision)
            report["rows"].append(row | profile_row(forward, transformer, 2, precision, timer))


def fill_busy(arguments: argparse.Namespace, report: Report, timer: Timer) -> None:
    from dit_bench.contenders import Contender, build, relative_error

    usual = ["S/2"] if arguments.quick else list(BUSY_WORKLOADS)
    for case, work in works(arguments, BUSY_WORKLOADS, usual):
        with torch.inference_mode():
            expected = work.forward("eager", "fp32")()
            error = relative_error(work.forward("eager", "bf16")(), expected)
        found = [Contender(f"{name} {precision}", "peer", precision,
                           partial(work.forward, name, precision))
                 for name, precision in (SUBJECT, *BUSY_PEERS)]  # fmt: skip
        built = build(found, expected, error, timer.progress.say)
        rows = busy_rows(case, built.functions, timer.rounds, arguments.busy)
        report["rows"] += [row | {"error": built.records[row["contender"]]["error"]}
                           for row in rows]  # fmt: skip


def fill(
    arguments: argparse.Namespace, report: Report, progress: Progress, keep: Callable[[], object]
) -> None:
    found = plans(arguments)
    if arguments.profile or arguments.busy:
        timer = Timer(found[0].device, found[0].rounds, math.inf, None, progress)
        with progress.run(1), torch.inference_mode():
            (fill_profile if arguments.profile else fill_busy)(arguments, report, timer)
        report["other_load"] = timer.load.mean
        return
    if found:
        measure(found, report, progress, keep)
        add_conditioning(report["rows"])
        report["ratios"] = ratio_rows(report["rows"])
    chosen = arguments.only or ([] if arguments.quick else WORKLOADS)
    if "memory" in chosen:
        progress.say("measuring memory in a process of its own")
        report["rows"].append(memory_row("S/2" if arguments.quick else "XL/2", arguments.threads))


def destination(arguments: argparse.Namespace) -> Path | None:
    """Where the JSON goes: as asked, else among the results if the run was a whole one."""
    if arguments.json is not None:
        return arguments.json
    whole = not (arguments.quick or arguments.only or arguments.profile or arguments.busy)
    return RESULTS / f"cpu-{slug(cpu_model())}.json" if whole and RESULTS.is_dir() else None


def check(arguments: argparse.Namespace) -> None:
    """Raise a one-line ValueError for options that do not go together."""
    check_threads(arguments.threads)
    if arguments.profile and arguments.busy:
        raise ValueError("--profile and --busy: give one of the two")
    for option, allowed in (("profile", BATCHES), ("busy", BUSY_WORKLOADS)):
        for name in arguments.only or ():
            if getattr(arguments, option) and name not in allowed:
                raise ValueError(f"--{option} {name}: choose one of {', '.join(allowed)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--quick", action="store_true", help=f"S/2 at batch 2, {QUICK_ROUNDS} rounds, one compile")
    add("--rounds", type=positive, help=f"of interleaved timing ({ROUNDS} unless given)")
    add("--threads", type=positive, default=torch.get_num_threads(), help="of every runtime")
    add("--only", nargs="+", choices=WORKLOADS, metavar="WORKLOAD", help=", ".join(WORKLOADS))
    add("--profile", action="store_true", help="where the lean forward's time goes, and no peers")
    add("--busy", type=positive, metavar="COUNT",
        help="lean and peers beside COUNT programs that each keep a processor busy")  # fmt: skip
    add("--wide", action="store_true", help="all columns, wider than the terminal")
    add("--json", type=Path, help="write every figure here (whole runs: benchmarks/results)")


def run(arguments: argparse.Namespace) -> int:
    from dit_bench.command import carry_out
    from dit_bench.outputs import check_outputs

    check(arguments)
    arguments.json = destination(arguments)
    check_outputs([arguments.json])  # before the long run
    if not arguments.quick:
        settle(print)
    device = torch.device("cpu")
    machine = describe(device) | {"threads": arguments.threads}
    settings = {"rounds": arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS),
                "conditioning_steps": STEPS}  # fmt: skip
    report = new_report("cpu", machine, settings, arguments.given)
    return carry_out(report, partial(fill, arguments, report), arguments)
