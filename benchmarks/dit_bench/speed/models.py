"""Models × numbers of images × kinds of work, into one report.

The report grows as parts are finished, so that what Ctrl-C leaves is whole. ``dit-bench --model``,
``dit-bench cpu`` and ``dit-bench gpu`` all measure by this.

More than 300 lines, because the kinds of work share their models and their contenders.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dit_bench.ceilings import FP8, measure_ceilings
from dit_bench.contenders import Name, float_dtype, relative_error
from dit_bench.cost import decoder_record, model_record
from dit_bench.load import OtherLoad
from dit_bench.machine import load_average
from dit_bench.progress import Progress
from dit_bench.report import WORK, Report
from dit_bench.speed.cast import Part, contenders
from dit_bench.speed.forward import Networks, Work
from dit_bench.speed.generation import GenerationCheck
from dit_bench.speed.latency import Task, Timer, shares
from dit_bench.speed.memory import MemoryWatch
from dit_bench.subjects import Subject, in_numerics, load_subject
from dit_bench.timing import Budget
from dit_engine.config import ModelConfig
from dit_engine.engine import Engine
from dit_engine.model import DiT
from dit_engine.runtime import limited_threads

if TYPE_CHECKING:
    from dit_bench.quality.paired import SetComparison


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        subject: backend and precision; peers: further names and precisions.
        batches: numbers of images; kinds: among `WORK`; size: pixels, of published models.
        half_null: half of a forward's rows are unlabelled, as under guidance.
        parts: of a forward, timed beside it and not compared with anything.
        parity: images of a paired comparison with eager float32, 0 for none; sets: what is asked
            of these as sets.
        keep_engines: whether `measure` gives back the engines of trained models.
        budget: what is not begun by its end is skipped.
        title: the name of the model in the rows, where another than its own.
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
    half_null: bool = False
    parts: tuple[Part, ...] = ()
    parity: int = 0
    sets: SetComparison | None = None
    keep_engines: bool = False
    budget: Budget | None = None
    title: str | None = None

    @property
    def stages(self) -> int:
        each = len(self.batches) * len(self.kinds) + bool(self.parity)
        return len(self.models) * (1 + each)


def measure(
    steps: Plan | Sequence[Plan | Callable[[Timer], object]],
    report: Report,
    progress: Progress,
    keep: Callable[[], object] = lambda: None,
) -> list[Engine]:
    """Fill ``report``; the engines of trained models where the plans keep them.

    steps: plans, and functions that measure something else at their place among them.
    keep: called whenever the report has grown.

    Raises KeyboardInterrupt after the part during which it was asked for.
    """
    steps = [steps] if isinstance(steps, Plan) else list(steps)
    plans = [step for step in steps if isinstance(step, Plan)]
    first, kept = plans[0], list[Engine]()
    report.setdefault("models", [])
    report["load_average"] = load_average()
    stages = sum(plan.stages for plan in plans) + 2 + any(p.sets is not None for p in plans)
    with limited_threads(first.threads), progress.run(stages):
        if first.sets is not None:
            progress.stage("reference set")
            sets = first.sets.with_moments(progress.quiet, progress.check)
            steps[steps.index(first)] = replace(first, sets=sets)
            progress.done()
        progress.stage("ceilings")
        dtypes = _dtypes(plans)
        ceilings = measure_ceilings(first.device, dtypes=dtypes)
        report["ceilings"] = {**vars(ceilings), "measured": "before"}
        progress.done()
        names = [name for plan in plans for name, _ in (plan.subject, *plan.peers)]
        served = any("://" in name for name in names)
        load = OtherLoad(known=not served)  # a server on this machine is no stranger
        for step in steps:
            plan = step if isinstance(step, Plan) else first
            timer = Timer(plan.device, plan.rounds, plan.seconds, ceilings, progress, load)
            if not isinstance(step, Plan):
                with torch.inference_mode():
                    step(timer)
                continue
            for name in step.models:
                engine = _Model(step, report, timer, keep).run(name)
                if engine is not None:
                    kept.append(engine)
                torch.compiler.reset()  # what was compiled holds its model's weights
                gc.collect()
        report["other_load"] = load.mean
        progress.stage("ceilings again")
        best = ceilings.better(measure_ceilings(first.device, dtypes=dtypes))
        report["ceilings"] = {**vars(best), "measured": "before and after"}
        for row in report["rows"]:
            row |= shares(row, best)
        progress.done()
    return kept


class _Model:
    """The part of a run that is about one model."""

    def __init__(
        self, plan: Plan, report: Report, timer: Timer, keep: Callable[[], object]
    ) -> None:
        self.plan, self.report, self.timer, self.keep = plan, report, timer, keep
        self.progress = timer.progress
        self.built_mib: float | None = None

    def run(self, name: str) -> Engine | None:
        plan = self.plan
        self.progress.stage(f"{name}: loading")
        with_vae = bool({"decode", "image"} & set(plan.kinds)) or plan.parity > 0
        subject = load_subject(name, size=plan.size, vae=plan.vae, with_vae=with_vae)
        own = timed = self._engine(subject, subject.model)
        if any(peer == "diffusers" for peer, _ in plan.peers):
            # Times are of the function that all can compute; pictures are of the model's own.
            model = in_numerics(subject.model, "diffusers")
            timed = own if model is subject.model else self._engine(subject, model)
        record = _describe(subject, timed.config)
        known = [model["model"] for model in self.report["models"]]
        if plan.title is None and record["model"] not in known:
            self.report["models"].append(record)
        self.progress.done()
        networks = Networks(timed)
        for images in plan.batches:
            work = Work(networks, images, plan.half_null)
            for kind in plan.kinds:
                if kind != "decode" or subject.vae is not None:
                    self.progress.stage(f"{subject.name} {kind}, {images}")
                    self._part(kind, subject, work, record)
                self.progress.done()
                self.progress.check()
        if plan.parity:
            self.progress.stage(f"{subject.name}: parity")
            self._parity(subject.name, own)
            self.progress.done()
        shows = plan.keep_engines and subject.trained and subject.vae is not None
        return own if shows else None

    def _engine(self, subject: Subject, model: DiT) -> Engine:
        return Engine(model, subject.vae, subject.label_names, self.plan.device,
                      max_batch_size=max(*self.plan.batches, 32))  # fmt: skip

    def _part(self, kind: str, subject: Subject, work: Work, record: dict[str, Any]) -> None:
        plan = self.plan
        watch = MemoryWatch(plan.device) if kind == "forward" else None
        check = GenerationCheck(work, plan.steps, plan.sampler, self.progress.check)
        found = contenders(kind, work, (plan.subject, *plan.peers), record, check, plan.parts)
        task = Task(kind, plan.title or subject.name, work.images, found, None)
        if plan.budget is not None and plan.budget.left() <= 0:
            self.report["rows"] += [
                {"section": kind, "case": task.case, "contender": c.name, "role": c.role,
                 "model": task.model, "images": work.images, "status": "skipped",
                 "reason": "no time was left"}
                for c in found
            ]  # fmt: skip
            self.keep()
            return
        with torch.inference_mode():
            if kind != "image":  # generations have a check of their own
                reference = partial(
                    {"forward": work.forward, "step": work.guided_step, "decode": work.decode}[
                        kind
                    ],
                    "eager",
                )
                task.expected = expected = reference("fp32")()
                if {c.precision for c in found} != {"fp32"}:
                    task.bf16_error = relative_error(reference("bf16")(), expected)
            if watch is not None:
                found[0] = replace(found[0], build=watch.around(found[0].build))
            rows, _ = self.timer.run(task)
        if watch is not None:
            rows[0] |= self._memory(watch)
        size = {"size": subject.size, "tokens": subject.model.config.num_tokens}
        self.report["rows"] += [row | size for row in rows]
        self.report["other_load"] = self.timer.load.mean
        self.keep()

    def _memory(self, watch: MemoryWatch) -> dict[str, float]:
        """The backend is built once; later numbers of images find it there."""
        seen = watch.record
        if "peak_mib" not in seen:
            return {}
        if self.built_mib is None:
            self.built_mib = seen["built_mib"]
        else:
            seen["peak_mib"] += self.built_mib
        return seen | {"built_mib": self.built_mib}

    def _parity(self, name: str, engine: Engine) -> None:
        from dit_bench.quality.parity import compare

        labels = [i % engine.config.num_classes for i in range(self.plan.parity)]
        self.report["rows"] += compare(
            engine, labels, [self.plan.subject], model=name, sets=self.plan.sets, seed=0,
            quiet=self.progress.quiet, check=self.progress.check, steps=self.plan.steps,
            sampler=self.plan.sampler,
        )  # fmt: skip
        self.keep()
        self.progress.check()


def _describe(subject: Subject, config: ModelConfig) -> dict[str, Any]:
    """config: of what is timed."""
    vae = subject.vae
    return {
        "model": subject.name,
        "weights": subject.weights,
        "size": subject.size,
        "config": config.to_dict(),
        "tokens": config.num_tokens,
        "cost": model_record(config),
        "decoder": None if vae is None else decoder_record(vae.config, config.input_size),
    }


def _dtypes(plans: Sequence[Plan]) -> tuple[torch.dtype, ...]:
    quantised = {"int8": torch.int8, "fp8": FP8}
    wanted = [precision for plan in plans for _, precision in (plan.subject, *plan.peers)]
    found = [quantised.get(precision, float_dtype(precision)) for precision in wanted]
    if any(precision in quantised for precision in wanted):
        found.append(torch.bfloat16)  # the decoder's
    return tuple(dict.fromkeys([torch.float32, *found]))
