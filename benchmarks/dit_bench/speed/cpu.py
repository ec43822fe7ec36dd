"""``dit-bench cpu``: the lean forward on this CPU beside its peers, as ratios from one run.

It compares DiT-XL/2 at 256 px, DiT-S/2, the built-in model and the VAE's decoder with diffusers,
OpenVINO and torch.compile on the same weights and inputs. Ratios have a meaning only on an idle
machine, so the load is recorded. Other measurements are ``--profile`` (where the lean forward's
time goes) and ``--busy 1`` (what another program's work costs).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dit_bench.command import carry_out, check_threads, positive
from dit_bench.contenders import Contender, build
from dit_bench.machine import cpu_model, describe, settle, slug
from dit_bench.progress import Progress
from dit_bench.report import Report, Row, new_report
from dit_bench.speed.busy import busy_rows
from dit_bench.speed.forward import STEPS, Networks, Work
from dit_bench.speed.latency import Timer, quantiles, reference
from dit_bench.speed.memory import measure as measure_memory
from dit_bench.speed.models import Plan, measure
from dit_bench.speed.profile import linears_alone, profile_row
from dit_bench.subjects import in_numerics, load_subject
from dit_bench.timing import ratio
from dit_engine.engine import Engine
from dit_engine.io.printable import one_line
from dit_engine.model import DiT
from dit_engine.runtime import limited_threads
from dit_kernels.quantized import quantized_why_not

CPU = torch.device("cpu")
# Models with their batches; then those of the other measurements.
BATCHES = {"XL/2": (2,), "S/2": (2, 16), "builtin": (2, 16)}
WORKLOADS = (*BATCHES, "vae", "memory")
BUSY_WORKLOADS = {"builtin": (2, 16), "S/2": (2,)}
SUBJECT = ("lean", "bf16")
# max-autotune is left out: frozen, it takes minutes and chooses the same products; otherwise it
# changes nothing here.
PEERS = (("lean", "int8"), ("openvino", "bf16"), ("compile", "bf16"), ("compile frozen", "bf16"),
         ("diffusers", "fp32"), ("diffusers", "bf16"), ("eager", "bf16"))  # fmt: skip
DECODE_PEERS = (("openvino", "bf16"), ("diffusers", "bf16"), ("eager", "bf16"))
BUSY_PEERS = (("lean", "int8"), ("openvino", "bf16"), ("diffusers", "bf16"))
# Ours over theirs, and the largest ratio that is a "pass" for DiT-XL/2 at 256 px and batch 2. If
# several names begin with a name ("compile"), the quickest of them is meant.
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
RESULTS = Path(__file__).parents[2] / "results"


def lean_transformer(work: Work, precision: str) -> Any:
    """The `LeanTransformer` that the lean forward runs, with its packed weights."""
    backend: Any = work.networks.backend("lean", precision)
    return backend.transformer


PARTS = (
    ("lean bf16 start", lambda work: work.start("lean", "bf16")),
    ("lean int8 start", lambda work: work.start("lean", "int8")),
    ("linears alone", lambda work: linears_alone(lean_transformer(work, "bf16"), work.images)),
)


def plans(arguments: argparse.Namespace) -> list[Plan]:
    """The forwards and the decode that are measured, in order."""
    common: dict[str, Any] = {
        "device": CPU, "subject": SUBJECT, "seconds": math.inf, "rounds": arguments.rounds,
        "threads": arguments.threads,
    }  # fmt: skip
    chosen = arguments.only or WORKLOADS
    found = [
        Plan((name,), peers=PEERS, batches=batches, kinds=("forward",), parts=PARTS, **common)
        for name, batches in BATCHES.items() if name in chosen
    ]  # fmt: skip
    if "vae" in chosen:  # any model will do; this one is made quickly
        found.append(
            Plan(("S/8",), title="VAE, 256 px", peers=DECODE_PEERS, kinds=("decode",), **common)
        )
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

    "conditioned" is the ratio in which our time includes the conditioning, spread over `STEPS`
    steps: lean computes it before the loop, peers within each forward (OpenVINO's has none).
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
        "theirs": other["contender"], "ratio": quantiles(taken), "ours_ms": one["ms"]["median"],
        "theirs_ms": other["ms"]["median"], "result": result(taken.median, goal),
    }  # fmt: skip
    whole = other["role"] != "part" and not other["contender"].startswith("openvino")
    if whole and (hoisted := one.get("conditioning_ms")) is not None:
        found["conditioned"] = taken.median * (1 + hoisted / STEPS / found["ours_ms"])
    return found


def add_conditioning(rows: Sequence[Row]) -> None:
    """Add what lean computes once before its `STEPS` steps: the first step minus another."""
    medians = {(r["case"], r["contender"]): r["ms"]["median"] for r in rows if "ms" in r}
    for row in rows:
        start = medians.get((row["case"], f"{row['contender']} start"))
        if start is not None and "ms" in row:
            row["conditioning_ms"] = max(0.0, start - row["ms"]["median"])


def result(value: float, goal: float | None) -> str:
    """ "pass" at or under the goal, "miss" above it, "" without one."""
    return "" if goal is None else "pass" if value <= goal else "miss"


def model_of(name: str) -> DiT:
    """The model ``name``, in a form that every peer can compute."""
    return in_numerics(load_subject(name, with_vae=False).model, "diffusers")


def memory_row(threads: int) -> Row:
    """Resident memory of the lean forward of XL/2, in a child process."""
    row: Row = {"section": "memory", "case": "XL/2, batch 2", "contender": "lean bf16",
                "goal": MEMORY_GOAL}  # fmt: skip
    try:
        found = measure_memory(model_of("XL/2"), threads)
    except (RuntimeError, ValueError) as error:
        return row | {"status": "skipped", "reason": one_line(error), "result": "skipped"}
    return row | {"status": "ok", **found, "result": result(found["value"], MEMORY_GOAL)}


def works(
    names: Sequence[str], batches: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Work]]:
    """The models at their batches, one after the other, each with its name as a case."""
    for name in names:
        networks = Networks(Engine(model_of(name), device="cpu"))
        for batch in batches[name]:
            yield f"{name}, batch {batch}", Work(networks, batch)


def fill_profile(names: Sequence[str], report: Report, timer: Timer) -> None:
    for case, work in works(names, dict.fromkeys(BATCHES, (2,))):
        for precision in ("bf16", "int8"):
            row: Row = {"section": "profile", "case": case, "contender": f"lean {precision}"}
            if precision == "int8" and (why := quantized_why_not("int8", CPU)):
                report["rows"].append(row | {"status": "skipped", "reason": why})
                continue
            one = Contender(row["contender"], "subject", precision,
                            partial(work.forward, "lean", precision))  # fmt: skip
            built = build([one], *reference(work.forward, [one]), timer.progress.say)
            row |= {"role": one.role, **built.records[one.name]}
            for forward in built.functions.values():  # none, if it computes another function
                transformer = lean_transformer(work, precision)
                row |= profile_row(forward, transformer, 2, precision, timer)
            report["rows"].append(row)


def fill_busy(names: Sequence[str], report: Report, timer: Timer, count: int) -> None:
    for case, work in works(names, BUSY_WORKLOADS):
        found = [Contender(f"{name} {precision}", "peer" if i else "subject", precision,
                           partial(work.forward, name, precision))
                 for i, (name, precision) in enumerate((SUBJECT, *BUSY_PEERS))]  # fmt: skip
        built = build(found, *reference(work.forward, found), timer.progress.say)
        timed = {r["contender"]: r for r in busy_rows(case, built.functions, timer.rounds, count)}
        for one in found:
            row = {"section": "busy", "case": case, "contender": one.name, "role": one.role}
            report["rows"].append(row | built.records[one.name] | timed.get(one.name, {}))


def fill(
    arguments: argparse.Namespace, report: Report, progress: Progress, keep: Callable[[], object]
) -> None:
    only = arguments.only
    if arguments.profile or arguments.busy:
        timer = Timer(CPU, arguments.rounds, math.inf, None, progress)
        with limited_threads(arguments.threads), progress.run(1), torch.inference_mode():
            if arguments.profile:
                fill_profile(only or ["XL/2"], report, timer)
            else:
                fill_busy(only or list(BUSY_WORKLOADS), report, timer, arguments.busy)
        report["other_load"] = timer.load.mean
        return
    if found := plans(arguments):
        measure(found, report, progress, keep)
        add_conditioning(report["rows"])
        report["ratios"] = ratio_rows(report["rows"])
    if only is None or "memory" in only:
        progress.say("measuring memory in a process of its own")
        report["rows"].append(memory_row(arguments.threads))


def destination(arguments: argparse.Namespace) -> Path | None:
    """Where the JSON goes: as the option says, else among the results if the run is a whole one."""
    if arguments.json is not None:
        return arguments.json
    whole = not (arguments.only or arguments.profile or arguments.busy)
    return RESULTS / f"cpu-{slug(cpu_model())}.json" if whole and RESULTS.is_dir() else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rounds", type=positive, default=15, help="of interleaved timing")
    add("--threads", type=positive, default=torch.get_num_threads(), help="of every runtime")
    add("--only", nargs="+", choices=WORKLOADS, metavar="WORKLOAD", help=", ".join(WORKLOADS))
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--profile", action="store_true",
        help="where the lean forward's time goes, and no peers")  # fmt: skip
    other.add_argument("--busy", type=positive, metavar="COUNT",
        help="lean and peers beside COUNT programs that each keep a processor busy")  # fmt: skip
    add("--wide", action="store_true", help="all columns, wider than the terminal")
    add("--json", type=Path, help="write every figure here (whole runs: benchmarks/results)")


def run(arguments: argparse.Namespace) -> int:
    from dit_bench.outputs import check_outputs

    check_threads(arguments.threads)
    for option, known in (("profile", BATCHES), ("busy", BUSY_WORKLOADS)):
        for name in arguments.only or ():
            if getattr(arguments, option) and name not in known:
                raise ValueError(f"--{option} {name}: choose one of {', '.join(known)}")
    arguments.json = destination(arguments)
    check_outputs([arguments.json])  # before the long run
    settle(print)
    machine = describe(CPU) | {"threads": arguments.threads}
    settings = {"rounds": arguments.rounds, "conditioning_steps": STEPS}
    report = new_report("cpu", machine, settings, arguments.given)
    return carry_out(report, partial(fill, arguments, report), arguments)
