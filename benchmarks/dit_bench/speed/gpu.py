"""``dit-bench gpu``: checks and measures DiT Engine on a CUDA machine in a limited time.

The most important parts come first, in case time runs out: the machine's ceilings (matrix products,
copies); forwards, guided steps and generations of XL/2 with many rows and with few, by every
backend and its peers; the operators, checked against float64, then timed; the VAE's decoder; the
other sizes; what takes minutes to compile; attention kernels of other packages. The JSON file is
written as it goes, as <name>.partial.

``--check`` only checks: every operator, a small model's forward by every contender, and whether an
image has the same bits alone and in a batch.

What fails its check is never timed, and makes the exit code 1. So does a run that did not end in
time: it tells where it stood, and its measurements stay in <name>.partial. The exit code is 2 if
there is no CUDA device.
"""

from __future__ import annotations

import argparse
import faulthandler
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dit_bench.contenders import Contender, Name, build, failed, relative_error
from dit_bench.machine import describe, slug
from dit_bench.progress import Progress
from dit_bench.report import Report, Row, new_report
from dit_bench.speed import operators
from dit_bench.speed.forward import Networks, Work
from dit_bench.speed.latency import Timer
from dit_bench.speed.models import Plan, measure
from dit_bench.speed.operator_cases import Case, all_cases
from dit_bench.subjects import check_name, in_numerics, load_subject
from dit_bench.timing import Budget
from dit_engine.backends import known_backends
from dit_engine.engine import Engine

SIZES = ("XL/2", "S/2", "L/2", "B/2")
"""In the order of their worth."""
SUBJECT: Name = ("lean", "bf16")
PEERS: tuple[Name, ...] = (("lean", "fp8"), ("eager", "bf16"), ("graph", "bf16"),
                           ("diffusers", "bf16"), ("compile blocks", "bf16"))  # fmt: skip
LATE_PEERS: tuple[Name, ...] = (("compile", "bf16"), ("autotune", "bf16"))
"""Their compilation takes minutes for a large model."""
MANY, FEW, ROUNDS = 64, 2, 30
START_SECONDS, RESERVE_SECONDS = 15.0, 15.0
"""Kept back: for the imports, which came before the clock started, and for the table."""
RESULTS = Path(__file__).parents[2] / "results"


def steps(
    device: torch.device, sizes: Sequence[str], budget: Budget, cases: Sequence[Case],
    report: Report, keep: Callable[[], object],
) -> list[Plan | Callable[[Timer], object]]:  # fmt: skip
    """What is measured, in order. Each part may use a share of the time left when it begins."""

    def plan(models: Sequence[str], share: float, **options: Any) -> Plan:
        common: dict[str, Any] = {"subject": SUBJECT, "peers": PEERS, "device": device,
                                  "rounds": ROUNDS, "seconds": 2.0}  # fmt: skip
        return Plan(tuple(models), budget=budget, share=share, **common | options)

    def check_and_time(timer: Timer) -> None:
        assert timer.ceilings is not None

        def keep_and_look() -> None:
            keep()
            timer.progress.check()  # whether to stop

        part = budget.part(0.6)
        operators.measure(cases, report, device, part, timer.ceilings, keep=keep_and_look)

    def third_party(timer: Timer) -> None:
        assert timer.ceilings is not None
        if budget.left() > 0:
            operators.measure_third_party(cases, report, device, timer.ceilings)

    ours = {"auto", "eager", "compile", "lean"}
    added = tuple((name, "bf16") for name in known_backends() if name not in ours)
    first, rest = sizes[:1], sizes[1:]
    return [
        plan(first, 0.4, batches=(MANY, FEW), kinds=("forward", "step")),
        plan(first, 0.5, batches=(FEW // 2, MANY // 2), kinds=("image",), sampler="dpm++"),
        check_and_time,
        plan(first, 0.6, batches=(1, 8), kinds=("decode",)),
        plan(rest, 0.8, batches=(MANY, FEW), kinds=("forward",)),
        plan(first, 1.0, batches=(FEW,), kinds=("forward",), peers=(*LATE_PEERS, *added)),
        third_party,
    ]


def check_rows(device: torch.device, model: str = "S/8") -> Iterator[Row]:
    """The checks of whole models: every contender's forward, and the bits of images."""
    subject = load_subject(model, with_vae=False)
    engine = Engine(in_numerics(subject.model, "diffusers"), device=device)
    work = Work(Networks(engine), FEW)
    with torch.inference_mode():
        expected = work.forward("eager", "fp32")()
        error = relative_error(work.forward("eager", "bf16")(), expected)
    found = [
        Contender(f"{name} {precision}", "subject" if name == "lean" else "peer", precision,
                  partial(work.forward, name, precision))
        for name, precision in (SUBJECT, ("lean", "fp32"), *PEERS, ("compile", "bf16"))
    ]  # fmt: skip
    built = build(found, expected, error, lambda _: None, device)
    for contender in found:
        yield {"section": "check", "case": f"forward of {subject.name}", "role": contender.role,
               "contender": contender.name, **built.records[contender.name]}  # fmt: skip
    for precision in ("fp32", "bf16"):
        row: Row = {"section": "check", "case": "bits of an image, alone and in a batch",
                    "role": "subject", "contender": f"lean {precision}"}  # fmt: skip
        options: dict[str, Any] = {"steps": 4, "backend": "lean", "precision": precision,
                                   "output": "latent"}  # fmt: skip
        try:
            together = engine.generate([1, 2, 3], seeds=[7, 8, 9], **options).images
            alone = [engine.generate([i + 1], seeds=[i + 7], **options).images[0] for i in range(3)]
        except Exception as broken:  # Triton's errors, say, are of no common class
            yield row | failed(broken)
            continue
        same = all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
        yield row | ({"status": "ok"} if same else {"status": "wrong", "reason": "bits differ"})


def cuda_device() -> torch.device:
    """The current CUDA device. Raises ValueError if there is none."""
    if not torch.cuda.is_available():
        raise ValueError(
            f"no CUDA device: torch {torch.__version__} finds none, and this is for CUDA "
            "(dit-bench cpu and dit-bench operators --device cpu are for the CPU)"
        )
    return torch.device("cuda", torch.cuda.current_device())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--check", action="store_true", help="check everything and time nothing")
    add("--minutes", type=float, default=9.0, help="the whole run ends by then")
    add("--sizes", nargs="+", default=list(SIZES), help="models, such as XL/2; 'none' for none")
    add("--wide", action="store_true", help="all columns, wider than the terminal")
    add("--json", type=Path, metavar="FILE",
        help="benchmarks/results/gpu-<device>.json unless given or --check")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    from dit_bench.command import carry_out
    from dit_bench.outputs import check_outputs

    device = cuda_device()
    seconds = 60 * arguments.minutes - START_SECONDS
    if not seconds > RESERVE_SECONDS:
        least = (START_SECONDS + RESERVE_SECONDS) / 60
        raise ValueError(f"minutes {arguments.minutes:g} is not above {least:g}")
    sizes = [] if arguments.sizes == ["none"] else arguments.sizes
    for size in sizes:
        check_name(size)
    machine = describe(device)
    if arguments.json is None and not arguments.check:
        here = RESULTS if RESULTS.is_dir() else Path()
        arguments.json = here / f"gpu-{slug(machine['gpu'] or 'unknown')}.json"
    check_outputs([arguments.json])
    budget = Budget(seconds - RESERVE_SECONDS)
    settings = {"minutes": arguments.minutes, "steps": 20}
    report = new_report("gpu", machine, settings, arguments.given)

    def fill(progress: Progress, keep: Callable[[], object]) -> None:
        cases = all_cases(device)
        if arguments.check:
            with torch.inference_mode(), progress.run(len(cases)):
                operators.measure(cases, report, device, budget, None, progress=progress)
            report["rows"] += check_rows(device)
        else:
            measure(steps(device, sizes, budget, cases, report, keep), report, progress, keep)

    # A signal cannot interrupt a call that waits for a hung kernel. This ends the process even
    # then, with code 1, and prints to standard error which lines of the program were running.
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        return carry_out(report, fill, arguments)
    finally:
        faulthandler.cancel_dump_traceback_later()
