"""One run of the benchmark: models × numbers of images × kinds of work, into one report.

The report grows as parts are finished, so that what Ctrl-C leaves is whole. `dit_bench.schema`
says what it holds.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dit_bench.ceilings import Ceilings, measure_ceilings
from dit_bench.contenders import Cast, Name
from dit_bench.counted import decoder_record, model_record
from dit_bench.energy import find_meter, joules_per_call
from dit_bench.forwards import Networks, Work
from dit_bench.generation_check import GenerationCheck
from dit_bench.hardware import load_average
from dit_bench.latency import Task, Timer, shares
from dit_bench.load import OtherLoad
from dit_bench.memory import MemoryWatch
from dit_bench.peers import Built, relative_error
from dit_bench.progress import Progress
from dit_bench.schema import KINDS
from dit_bench.subjects import Subject, float_dtype, in_numerics, load_subject
from dit_engine.config import ModelConfig
from dit_engine.engine import Engine
from dit_engine.model import DiT
from dit_engine.runtime import limited_threads

if TYPE_CHECKING:
    from dit_bench.quality.paired import SetComparison


Report = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    subject: backend and precision. peers: further names and precisions. batches: numbers of
    images. kinds: among `KINDS`. size: pixels, of published models. parity: images of a paired
    comparison with eager float32, 0 for none; sets: what is asked of these as sets. keep_engines:
    whether `measure` gives back those of trained models.
    """

    models: tuple[str, ...]
    subject: Name
    device: torch.device
    peers: tuple[Name, ...] = ()
    batches: tuple[int, ...] = (1,)
    kinds: tuple[str, ...] = KINDS
    size: int | None = None
    vae: str | None = None
    steps: int = 20
    sampler: str = "ddpm"
    rounds: int = 20
    seconds: float = 20.0
    threads: int | None = None
    parity: int = 0
    sets: SetComparison | None = None
    keep_engines: bool = False

    @property
    def stages(self) -> int:
        each = len(self.batches) * len(self.kinds) + bool(self.parity)
        return 2 + (self.sets is not None) + len(self.models) * (1 + each)


def measure(
    plan: Plan, report: Report, progress: Progress, keep: Callable[[], object] = lambda: None
) -> list[Engine]:
    """Fill ``report``; the engines of trained models where the plan keeps them.

    keep: called whenever the report has grown.

    Raises KeyboardInterrupt after the part during which it was asked for.
    """
    kept: list[Engine] = []
    report["load_average"] = load_average()
    with limited_threads(plan.threads), progress.run(plan.stages):
        if plan.sets is not None:
            progress.stage("reference set")
            sets = plan.sets.with_moments(progress.quiet, progress.check)
            plan = replace(plan, sets=sets)
            progress.done()
        progress.stage("ceilings")
        ceilings = measure_ceilings(plan.device, dtypes=_dtypes(plan))
        report["ceilings"] = {**vars(ceilings), "measured": "before"}
        progress.done()
        served = any("://" in name for name, _ in (plan.subject, *plan.peers))
        load = OtherLoad(known=not served)  # a server on this machine is no stranger
        timer = Timer(plan.device, plan.rounds, plan.seconds, ceilings, progress, load)
        for name in plan.models:
            engine = _Model(plan, report, timer, keep).run(name)
            if engine is not None:
                kept.append(engine)
            torch.compiler.reset()  # what was compiled holds its model's weights
            gc.collect()
        progress.stage("ceilings again")
        best = better(ceilings, measure_ceilings(plan.device, dtypes=_dtypes(plan)))
        report["ceilings"] = {**vars(best), "measured": "before and after"}
        for row in report["measurements"]:
            row |= shares(row, best)
        progress.done()
    return kept


def better(first: Ceilings, second: Ceilings) -> Ceilings:
    """The higher rate of each: other load on the machine only ever lowers them."""
    rates = {
        kind: max(rate, second.matmul_tflop_s.get(kind, rate))
        for kind, rate in first.matmul_tflop_s.items()
    }
    copy_gb_s = max(first.copy_gb_s, second.copy_gb_s)
    return replace(first, copy_gb_s=copy_gb_s, matmul_tflop_s=rates)


class _Model:
    """The part of a run that is about one model."""

    def __init__(
        self, plan: Plan, report: Report, timer: Timer, keep: Callable[[], object]
    ) -> None:
        self.plan, self.report, self.timer, self.keep = plan, report, timer, keep
        self.progress = timer.progress
        meter = find_meter(plan.device)
        report["energy"] = meter if isinstance(meter, str) else meter.source
        self.meter = None if isinstance(meter, str) else meter
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
        self.report["models"].append(record)
        self.progress.done()
        networks = Networks(timed)
        cast = Cast(networks, plan.subject, list(plan.peers), record["cost"]["total"]["macs"])
        for images in plan.batches:
            work = Work(networks, images)
            for kind in plan.kinds:
                self.progress.stage(f"{subject.name} {kind}, {images}")
                if kind != "decode" or subject.vae is not None:
                    self._part(kind, subject, cast, work, record)
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

    def _part(
        self, kind: str, subject: Subject, cast: Cast, work: Work, record: dict[str, Any]
    ) -> None:
        decode_macs = record["decoder"]["macs"] if record["decoder"] else 0
        cast.watch = MemoryWatch(self.plan.device) if kind == "forward" else None
        with torch.inference_mode():
            if kind == "forward":
                contenders = cast.forward(work)
                expected = work.eager("fp32")()
                error = self._bf16_error(work.eager, expected)
            elif kind == "step":
                contenders = cast.step(work)
                expected = work.guided_step("eager", "fp32")()
                error = self._bf16_error(lambda p: work.guided_step("eager", p), expected)
            elif kind == "decode":
                contenders = cast.decode(work, decode_macs)
                expected = work.decode(False, "fp32")()
                error = self._bf16_error(lambda p: work.decode(False, p), expected)
            else:
                way = (self.plan.steps, self.plan.sampler)
                check = GenerationCheck(work, *way, self.progress.check)
                contenders, expected, error = cast.image(work, check, decode_macs), None, 0.0
            task = Task(subject.name, kind, work.images, contenders, expected, error)
            rows, built = self.timer.run(task)
        extra = {"size": subject.size, "tokens": subject.model.config.num_tokens}
        if cast.watch is not None:
            rows[0] |= self._memory(cast.watch)
        self._energy(rows[0], built)
        self.report["measurements"] += [row | extra for row in rows]
        self.report["other_load"] = self.timer.load.mean
        self.keep()

    def _bf16_error(self, build: Any, expected: torch.Tensor) -> float:
        """Of eager bf16, unless everything is float32."""
        precisions = {self.plan.subject[1], *(precision for _, precision in self.plan.peers)}
        return 0.0 if precisions == {"fp32"} else relative_error(build("bf16")(), expected)

    def _memory(self, watch: MemoryWatch) -> dict[str, float]:
        """The backend is built once; later numbers of images find it there."""
        seen = watch.record()
        if seen.keys() == {"built_mib", "peak_mib"}:
            if self.built_mib is None:
                self.built_mib = seen["built_mib"]
            else:
                seen["peak_mib"] += self.built_mib
            seen["built_mib"] = self.built_mib
        return seen

    def _energy(self, row: dict[str, Any], built: Built) -> None:
        if self.meter is None or row["status"] != "ok":
            return
        device = self.plan.device
        wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
        joules = joules_per_call(built.functions[row["name"]], self.meter, wait)
        row["joules_per_image"] = joules / row["images"]

    def _parity(self, name: str, engine: Engine) -> None:
        from dit_bench.quality.parity import compare

        labels = [i % engine.config.num_classes for i in range(self.plan.parity)]
        options: dict[str, Any] = {"steps": self.plan.steps, "sampler": self.plan.sampler}
        options |= {"sets": self.plan.sets, "quiet": self.progress.quiet}
        check = self.progress.check
        rows = compare(engine, labels, [self.plan.subject], seed=0, check=check, **options)
        same = {key: rows[0][key] for key in ("n", "settings", "interrupted")}
        self.report["parity"].append({"model": name, "subjects": rows, **same})
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


def _dtypes(plan: Plan) -> tuple[torch.dtype, ...]:
    from dit_bench.ceilings import FP8

    quantised = {"int8": torch.int8, "fp8": FP8}
    wanted: Sequence[str] = [plan.subject[1], *(precision for _, precision in plan.peers)]
    found = [quantised.get(precision, float_dtype(precision)) for precision in wanted]
    if any(precision in quantised for precision in wanted):
        found.append(torch.bfloat16)  # the decoder's
    return tuple(dict.fromkeys([torch.float32, *found]))
