"""Models × numbers of images × kinds of work, into one report.

The report grows as parts are finished, so after Ctrl-C it holds whole parts. ``dit-bench --model``,
``dit-bench cpu`` and ``dit-bench gpu`` all use this module.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dit_bench.ceilings import FP8, measure_ceilings
from dit_bench.contenders import (
    COMPILE_SECONDS,
    FORMS,
    LIBRARIES,
    Contender,
    Name,
    failed,
    float_dtype,
)
from dit_bench.cost import UNET, Cost, decoder_record, model_record, needed_weights, unet_cost
from dit_bench.load import OtherLoad
from dit_bench.machine import load_average
from dit_bench.progress import Progress
from dit_bench.report import WORK, Report, Row
from dit_bench.speed.forward import Networks, Work, decoder_precision
from dit_bench.speed.generation import GenerationCheck
from dit_bench.speed.latency import Timer, reference, shares
from dit_bench.subjects import Subject, in_numerics, load_subject
from dit_engine.config import ModelConfig
from dit_engine.engine import Engine
from dit_engine.model import DiT
from dit_engine.runtime import limited_threads

if TYPE_CHECKING:
    from dit_bench.quality.paired import SetComparison

Part = tuple[str, Callable[[Work], Callable[[], Any]]]
"""A part of a forward that is timed by itself: its name, and what builds it."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    batches: numbers of images. parity: images of a paired comparison with eager float32, 0 for
    none; sets: what is asked of these as sets. title: of the model in the rows.
    """

    models: tuple[str, ...]
    subject: Name
    device: torch.device
    peers: tuple[Name, ...] = ()
    batches: tuple[int, ...] = (1,)
    kinds: tuple[str, ...] = WORK
    size: int | None = None
    vae: str | None = None
    steps: int = 20
    sampler: str = "ddpm"
    rounds: int = 20
    seconds: float = 20.0
    threads: int | None = None
    parts: tuple[Part, ...] = ()
    parity: int = 0
    sets: SetComparison | None = None
    title: str | None = None

    @property
    def stages(self) -> int:
        each = len(self.batches) * len(self.kinds) + bool(self.parity)
        return len(self.models) * (1 + each)


def measure(
    plans: Plan | Sequence[Plan],
    report: Report,
    progress: Progress,
    keep: Callable[[], object] = lambda: None,
) -> None:
    """Fill ``report``; ``keep`` is called whenever it has grown.

    Raises KeyboardInterrupt after the part during which Ctrl-C was pressed.
    """
    plans = [plans] if isinstance(plans, Plan) else list(plans)
    first = plans[0]
    report.setdefault("models", [])
    report["load_average"] = load_average()
    stages = sum(plan.stages for plan in plans) + 2 + any(p.sets is not None for p in plans)
    with limited_threads(first.threads), progress.run(stages):
        if first.sets is not None:
            progress.stage("reference set")
            sets = first.sets.with_moments(progress.quiet, progress.check)
            plans[0] = replace(first, sets=sets)
            progress.done()
        progress.stage("ceilings")
        dtypes = _dtypes(plans)
        ceilings = measure_ceilings(first.device, dtypes=dtypes)
        report["ceilings"] = {**vars(ceilings), "measured": "before"}
        progress.done()
        names = [name for plan in plans for name, _ in (plan.subject, *plan.peers)]
        served = any("://" in name for name in names)
        load = OtherLoad(known=not served)  # the load of our server is not other load
        for plan in plans:
            timer = Timer(plan.device, plan.rounds, plan.seconds, ceilings, progress, load)
            for name in plan.models:
                progress.stage(f"{name}: loading")
                opened = open_model(plan, name)
                progress.done()
                measure_model(plan, opened, report, timer, keep)
                torch.compiler.reset()  # what was compiled holds its model's weights
                gc.collect()
        report["other_load"] = load.mean
        progress.stage("ceilings again")
        best = ceilings.better(measure_ceilings(first.device, dtypes=dtypes))
        report["ceilings"] = {**vars(best), "measured": "before and after"}
        for row in report["rows"]:
            row |= shares(row, best)
        progress.done()


class Opened(NamedTuple):
    """A model that is ready to be measured.

    own: the model's engine. networks: those of the timed engine, which is another one if diffusers
    is a peer and computes a slightly different function. record: the model's entry in the report.
    """

    subject: Subject
    own: Engine
    networks: Networks
    record: dict[str, Any]


def open_model(plan: Plan, name: str) -> Opened:
    with_vae = bool({"decode", "image"} & set(plan.kinds)) or plan.parity > 0
    subject = load_subject(name, size=plan.size, vae=plan.vae, with_vae=with_vae)

    def engine_of(model: DiT) -> Engine:
        return Engine(model, subject.vae, subject.label_names, plan.device,
                      max_batch_size=max(*plan.batches, 32))  # fmt: skip

    own = timed = engine_of(subject.model)
    if any(peer == "diffusers" for peer, _ in plan.peers):
        # Times are of the function that all can compute; parity is of the model's own function.
        model = in_numerics(subject.model, "diffusers")
        timed = own if model is subject.model else engine_of(model)
    return Opened(subject, own, Networks(timed), _describe(subject, timed.config))


def measure_model(
    plan: Plan, opened: Opened, report: Report, timer: Timer, keep: Callable[[], object]
) -> None:
    progress, (subject, own, networks, record) = timer.progress, opened
    if plan.title is None and record["model"] not in [m["model"] for m in report["models"]]:
        report["models"].append(record)
    for images in plan.batches:
        work = Work(networks, images)
        for kind in plan.kinds:
            if kind != "decode" or subject.vae is not None:
                progress.stage(f"{subject.name} {kind}, {images}")
                rows = _rows(plan, kind, work, record, timer)
                for row in rows:
                    if "built_mib" in row:  # a backend is built once, and found there later
                        whole = networks.built_mib.setdefault(row["contender"], row["built_mib"])
                        row["peak_mib"] += whole - row["built_mib"]
                        row["built_mib"] = whole
                report["rows"] += rows
                report["other_load"] = timer.load.mean
                keep()
            progress.done()
            progress.check()
    if plan.parity:
        from dit_bench.quality.parity import compare

        progress.stage(f"{subject.name}: parity")
        labels = [i % own.config.num_classes for i in range(plan.parity)]
        report["rows"] += compare(
            own, labels, [plan.subject], model=subject.name, sets=plan.sets, seed=0,
            quiet=progress.quiet, check=progress.check, steps=plan.steps, sampler=plan.sampler,
        )  # fmt: skip
        keep()
        progress.check()
        progress.done()


def _rows(plan: Plan, kind: str, work: Work, record: dict[str, Any], timer: Timer) -> list[Row]:
    """The rows of all contenders in one kind of work."""
    check = GenerationCheck(work, plan.steps, plan.sampler, timer.progress.check)
    found = contenders(kind, work, (plan.subject, *plan.peers), record, check, plan.parts)
    model, images = plan.title or record["model"], work.images
    common: Row = {"section": kind, "case": f"{model}, batch {images}", "model": model,
                   "images": images} | {key: record[key] for key in ("size", "tokens")}  # fmt: skip
    if timer.budget is not None and timer.budget.left() <= 0:
        late = {"status": "skipped", "reason": "no time was left"}
        return [common | {"contender": one.name, "role": one.role, **late} for one in found]
    runs = {"forward": work.forward, "step": work.guided_step, "decode": work.decode}
    try:
        with torch.inference_mode():
            # A generation has a check of its own.
            expected: Any = reference(runs[kind], found) if kind in runs else ()
            return timer.run(common, found, *expected)
    except Exception as broken:
        if timer.budget is None:
            raise
        return [common | {"contender": "all", "role": "subject", **failed(broken)}]


def contenders(
    kind: str,
    work: Work,
    names: Sequence[Name],
    record: dict[str, Any],
    check: GenerationCheck,
    parts: Sequence[Part] = (),
) -> list[Contender]:
    """The contenders in one kind of work: the first of ``names`` is the subject, others are peers.

    record: the model's cost. check: the check of whole generations, which also has their settings.
    """
    forward = record["cost"]["total"]["flops"]
    decoder = record["decoder"]["flops"] if record["decoder"] else 0
    # Under guidance there are two rows per image.
    image = 2 * check.steps * forward + decoder
    flops = {"forward": forward, "step": 2 * forward, "decode": decoder, "image": image}[kind]
    left_out = {"forward": (), "decode": ("unet", *FORMS)}.get(kind, (*LIBRARIES, *FORMS))
    found: dict[str, Contender] = {}
    for i, (name, precision) in enumerate(dict.fromkeys(names)):
        if name in left_out:
            continue
        seconds = COMPILE_SECONDS.get(name, 0.0)
        more: dict[str, Any] = {"flops": flops * work.images, "seconds": seconds}
        if kind == "image":
            build = partial(work.generation, name, precision, check.steps, check.sampler)
            more["check"] = partial(check, name, precision)
        elif kind == "decode":
            build = partial(work.decode, name, precision)
            # int8 and bf16 decode in the same way, and so do compilers: only the first is timed.
            precision = decoder_precision(precision)
        else:
            runs = {"forward": work.forward, "step": work.guided_step}
            build = partial(runs[kind], name, precision)
            size = 1 if precision in ("int8", "fp8") else float_dtype(precision).itemsize
            more["weight_bytes"] = needed_weights(work.engine.config) * size
        title, role = f"{name} {precision}", "peer" if i else "subject"
        if name == "unet":
            title, role = f"{UNET} {precision}", "other network"
            try:
                cost = unet_cost()
            except ImportError:  # reported when the peer is built
                cost = Cost()
            more = {"flops": cost.flops * work.images,
                    "weight_bytes": cost.parameters * float_dtype(precision).itemsize}  # fmt: skip
        found.setdefault(title, Contender(title, role, precision, build, **more))
    if kind == "forward":
        for name, make in parts:
            found[name] = Contender(name, "part", "bf16", partial(make, work))
    return list(found.values())


def _describe(subject: Subject, config: ModelConfig) -> dict[str, Any]:
    """The "models" entry of a report; config: of the model that is timed."""
    vae = subject.vae
    return {
        "model": subject.name, "weights": subject.weights, "size": subject.size,
        "config": config.to_dict(), "tokens": config.num_tokens, "cost": model_record(config),
        "decoder": None if vae is None else decoder_record(vae.config, config.input_size),
    }  # fmt: skip


def _dtypes(plans: Sequence[Plan]) -> tuple[torch.dtype, ...]:
    quantised = {"int8": torch.int8, "fp8": FP8}
    wanted = [precision for plan in plans for _, precision in (plan.subject, *plan.peers)]
    found = [quantised.get(precision, float_dtype(precision)) for precision in wanted]
    if any(precision in quantised for precision in wanted):
        found.append(torch.bfloat16)  # the decoder's
    return tuple(dict.fromkeys([torch.float32, *found]))
