"""Forward passes and whole generations of the published sizes, checked before they are timed.

The weights are random, the modulations' too (as initialised for training they would be zero, and
every block the identity); a pass takes as long as with trained ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_bench.budget import Budget
from dit_bench.ceilings import Ceilings
from dit_bench.gpu_contenders import CUDA_CONTENDERS, EAGER, Contender, Evaluate, evaluator
from dit_bench.gpu_inputs import (
    TIMESTEPS,
    Inputs,
    loop_flops,
    own_backend,
    random_decoder,
    random_model,
    with_numerics,
)
from dit_bench.gpu_report import Report, failure, skipped
from dit_bench.operator_checks import DeviceLost, check_device, largest, relative_error, rms_error
from dit_bench.timing import interleave
from dit_engine.backends import Backend
from dit_engine.config import ModelConfig
from dit_engine.engine import Engine
from dit_engine.errors import BackendUnavailable
from dit_engine.runtime import is_out_of_memory
from dit_engine.vae import VAEConfig
from dit_kernels import Unavailable

ERROR_RATIO, PEER_RATIO = 2.0, 4.0
"""Of a half-precision forward, ours or a peer's: its error over the eager model's in bf16, at most.
"""
FP32_ERROR = 1e-5
"""Of a float32 forward, at most, relative to the eager model."""
QUANTIZED_RMS = 0.25
"""Of a quantised forward: beyond it the output is wrong. How good it is, the record says."""
LATENT_RATIO = 4.0
"""Of a generation's latents: half precision's error over the eager model's in bf16, at most."""
CHECK_BATCH = 2
PIXEL_IMAGES = 8
"""Of the one generation that goes as far as pixels."""
STEPS, GUIDANCE = 20, 4.0
_REFERENCE_IMAGES = 8  # float32 is slow: batches up to this are compared with it

Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What is measured of one model.

    Attributes:
        batches: rows of a forward; images: of a generation, two rows each for guidance.
        pixels: one generation as far as pixels.
    """

    name: str
    config: ModelConfig
    batches: Sequence[int]
    images: Sequence[int]
    pixels: bool = True


@dataclass
class ModelBenchmark:
    """Records rows in ``report``'s sections "forwards", "generate" and "pixels".

    Attributes:
        vae: of the generation to pixels, with random weights; None leaves it out.
    """

    report: Report
    device: torch.device
    budget: Budget
    ceilings: Ceilings
    contenders: Sequence[Contender] = CUDA_CONTENDERS
    rounds: int = 20
    vae: VAEConfig | None = None
    _peers: dict[Any, Backend] = field(default_factory=dict, init=False)

    def run(self, works: Sequence[Work], late: bool = False) -> None:
        """Measure each model, in order, with the contenders that are late or with the others.

        Each of the others may use as much of the time left as those to come, the first three times
        that; those that are late whatever is left.

        Raises `DeviceLost` where nothing more could be measured.
        """
        whole = self.budget
        chosen = [c for c in self.contenders if c.late == late]
        for i, work in enumerate(works if chosen else ()):
            weight = 3 if i == 0 else 1
            share = 1 if late else weight / (len(works) - i - 1 + weight)
            self.budget = whole.part(share)
            self._model(work, chosen)
        self.budget = whole

    def _model(self, work: Work, contenders: Sequence[Contender]) -> None:
        row = {"model": work.name, "contender": "all", "batch": "all"}
        if self.budget.left() <= 0:
            self.report.record("forwards", row | skipped("time budget"))
            return
        try:
            self._measure(work, contenders)
        except DeviceLost:
            raise
        except Exception as broken:
            check_device(self.device, work.name)
            self.report.record("forwards", row | failure(broken))
        self._peers.clear()
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _measure(self, work: Work, contenders: Sequence[Contender]) -> None:
        name, pixels = work.name, work.pixels and self.vae is not None
        vae = random_decoder(self.vae, self.device) if pixels and self.vae is not None else None
        model = random_model(work.config, self.device)
        most = max(work.images, default=1)
        engine = Engine(model, vae, device=self.device, max_batch_size=most)
        engines = {"official": engine}
        if any(c.numerics == "diffusers" for c in contenders):
            engines["diffusers"] = Engine(with_numerics(model, "diffusers"), device=self.device)
        quick = [c for c in contenders if not c.seconds]
        slow = [c for c in contenders if c.seconds]
        made = [c for c in contenders if c.generates]
        for batch in work.batches:
            self._forwards(name, engines, batch, quick)
        for images in work.images:
            self._generations(name, engine, images, [c for c in made if c in quick])
        for batch in work.batches:
            self._forwards(name, engines, batch, slow)
        for images in work.images:
            self._generations(name, engine, images, [c for c in made if c in slow])
        if pixels:
            self._to_pixels(name, engine, made)

    def _forwards(
        self, name: str, engines: dict[str, Engine], batch: int, contenders: Sequence[Contender]
    ) -> None:
        contenders = [c for c in contenders if c.meets(batch, CHECK_BATCH)]
        if not contenders:
            return
        if self.budget.left() <= 0:
            for contender in contenders:
                row = {"model": name, "contender": contender.name, "batch": batch}
                self.report.record("forwards", row | skipped("time budget"))
            return
        rows: dict[str, Row] = {}
        passed: dict[str, Evaluate] = {}

        inputs = Inputs(engines["official"], batch)
        eager = self._evaluator(EAGER, engines["official"], inputs)
        allowed = {"official": [inputs.error(eager, step) for step in range(len(TIMESTEPS))]}
        for contender in contenders:
            row = {"model": name, "contender": contender.name, "batch": batch}

            def check(c: Contender = contender) -> tuple[Row, Evaluate]:
                engine, own = engines[c.numerics], inputs
                backend = self._backend(c, engine)  # before references are computed for it
                if c.numerics != "official":
                    own = Inputs(engine, batch)
                    plain = self._evaluator(EAGER, engine, own)
                    allowed[c.numerics] = [own.error(plain, k) for k in range(len(TIMESTEPS))]
                return self._check(c, backend, own, allowed[c.numerics])

            rows[contender.name] = row | self._guarded(contender, check, passed)
        timed = {c.name: passed[c.name] for c in contenders if c.timed and c.name in passed}
        if timed:
            # The eager model anchors every group: ratios to it come from the same rounds.
            calls = {k: _bound(f, inputs.x) for k, f in {EAGER.name: eager, **timed}.items()}
            try:
                taken = interleave(calls, self.rounds, device=self.device, seconds=2.0)
            except Exception as broken:
                check_device(self.device, f"the timing of {name}")
                for key in timed:
                    rows[key] |= failure(broken)
            else:
                flops = loop_flops(engines["official"].config) * batch
                ceiling = self.ceilings.matmul_tflop_s.get("bf16")
                for key in timed:
                    ms = taken.ms(key)
                    rate = flops / ms.median / 1e9
                    rows[key] |= {
                        "ms": {"q10": ms.low, "median": ms.median, "q90": ms.high},
                        "rounds": taken.rounds,
                        "tflop_s": rate,
                        "percent_of_bf16_ceiling": 100 * rate / ceiling if ceiling else None,
                        "speedup_over_eager": taken.ratio(EAGER.name, key).median,
                    }
        for row in rows.values():
            self.report.record("forwards", row)

    def _evaluator(self, contender: Contender, engine: Engine, inputs: Inputs) -> Evaluate:
        backend = self._backend(contender, engine)
        return evaluator(contender, backend, inputs.labels, inputs.timesteps, inputs.x)

    def _backend(self, contender: Contender, engine: Engine) -> Backend:
        if contender.factory is not None:
            key = (contender.factory, contender.precision)
            if key not in self._peers:  # its forms share it
                with torch.inference_mode(False), torch.no_grad():
                    made = contender.factory(engine.model, contender.precision, self.device)
                self._peers[key] = made
            return self._peers[key]
        try:
            return own_backend(engine, contender.backend, contender.precision)
        except ValueError as refusal:
            if contender.added:
                raise BackendUnavailable(str(refusal)) from refusal
            raise

    def _check(
        self, contender: Contender, backend: Backend, inputs: Inputs, allowed: Sequence[float]
    ) -> tuple[Row, Evaluate]:
        run = evaluator(contender, backend, inputs.labels, inputs.timesteps, inputs.x)
        worst: Row = {"status": "ok", "error": 0.0, "rms_error": 0.0, "eager_bf16_error": 0.0}
        for step, budget in enumerate(allowed):
            output = run(inputs.xs[step], step).clone()  # buffers may be used again
            exact = inputs.exact[step][:, : output.shape[1]]
            error, rms = relative_error(output, exact), rms_error(output, exact)
            for name, value in (
                ("error", error),
                ("rms_error", rms),
                ("eager_bf16_error", budget),
            ):
                worst[name] = largest([worst[name], value])
            if contender.quantized:
                wrong = not rms <= QUANTIZED_RMS
                rule = f"rms error {rms:.3g}, allowed is {QUANTIZED_RMS:g}"
            else:
                ratio = ERROR_RATIO if contender.factory is None else PEER_RATIO
                limit = FP32_ERROR if contender.precision == "fp32" else ratio * budget
                wrong = not error <= limit
                rule = f"error {error:.3g}, allowed is {limit:.3g}"
            if wrong:
                raise Wrong(f"{rule} (time step {TIMESTEPS[step]})", worst)
        return worst, run

    def _guarded(
        self, contender: Contender, find: Callable[[], tuple[Row, Any]], passed: dict[str, Any]
    ) -> Row:
        """The outcome of ``find`` as a row's part; what comes with it goes into ``passed``."""
        if self.budget.left() <= contender.seconds:
            return skipped("time budget")
        try:
            row, passed[contender.name] = find()
            return row
        except Wrong as wrong:
            if contender.factory is not None:  # theirs to mend
                return wrong.row | skipped(f"peer: {wrong}")
            return wrong.row | {"status": "failed", "reason": str(wrong)}
        except (BackendUnavailable, Unavailable, ImportError) as reason:
            return skipped(reason)
        except Exception as broken:
            if is_out_of_memory(broken):
                return skipped("out of memory")
            check_device(self.device, contender.name)
            if contender.factory is not None:
                return skipped(f"peer: {type(broken).__name__}: {broken}")
            return failure(broken)

    def _generations(
        self, name: str, engine: Engine, images: int, contenders: Sequence[Contender]
    ) -> None:
        references: dict[str, Tensor] = {}

        def latents(backend: str, precision: str) -> Tensor:
            labels = [i % engine.config.num_classes for i in range(images)]
            return engine.generate(
                labels, steps=STEPS, sampler="dpm++", guidance_scale=GUIDANCE, seed=0,
                backend=backend, precision=precision, output="latent",
            ).images  # fmt: skip

        def measure(contender: Contender) -> tuple[Row, None]:
            self._backend(contender, engine)  # kept by the engine
            if images <= _REFERENCE_IMAGES and not references:
                for precision in ("fp32", "bf16"):
                    references[precision] = latents("eager", precision)
            found = latents(contender.backend, contender.precision)  # and the warm-up
            row: Row = {"status": "ok", "steps": STEPS, "guidance_scale": GUIDANCE}
            if not bool(found.isfinite().all()):
                raise Wrong("latents hold NaN or infinity", row)
            if references:
                error = rms_error(found, references["fp32"])
                eager = rms_error(references["bf16"], references["fp32"])
                row |= {"rms_error": error, "eager_bf16_rms_error": eager}
                if not contender.quantized and not error <= LATENT_RATIO * eager:
                    limit = LATENT_RATIO * eager
                    raise Wrong(f"latents' rms error {error:.3g}, allowed is {limit:.3g}", row)
            seconds = []
            while len(seconds) < 3 and sum(seconds) < 4.0:
                start = time.perf_counter()
                latents(contender.backend, contender.precision)
                seconds.append(time.perf_counter() - start)
            middle = sorted(seconds)[len(seconds) // 2]
            return row | {"seconds": seconds, "images_per_s": images / middle}, None

        for contender in contenders:
            row = {"model": name, "contender": contender.name, "batch": images}
            row |= self._guarded(contender, lambda c=contender: measure(c), {})
            self.report.record("generate", row)

    def _to_pixels(self, name: str, engine: Engine, contenders: Sequence[Contender]) -> None:
        """One generation from labels to uint8 images, the decoder's time with the rest."""
        n, references = PIXEL_IMAGES, dict[str, Tensor]()
        labels = [i % engine.config.num_classes for i in range(n)]

        def pixels(backend: str, precision: str) -> Tensor:
            images = engine.generate(
                labels, steps=STEPS, sampler="dpm++", guidance_scale=GUIDANCE, seed=0,
                backend=backend, precision=precision, output="np",
            ).images  # fmt: skip
            return torch.from_numpy(images).float()  # (N, H, W, 3)

        def measure(contender: Contender) -> tuple[Row, None]:
            self._backend(contender, engine)  # kept by the engine
            for precision in ("fp32", "bf16"):
                if precision not in references:
                    references[precision] = pixels("eager", precision)
            found = pixels(contender.backend, contender.precision)  # and the warm-up
            row: Row = {"status": "ok", "steps": STEPS, "guidance_scale": GUIDANCE}
            error, eager = (
                (a - references["fp32"]).square().mean().sqrt().item()
                for a in (found, references["bf16"])
            )
            row |= {"rms_error_levels": error, "eager_bf16_rms_error_levels": eager}
            limit = LATENT_RATIO * eager + 1  # a level for the rounding to whole ones
            if not contender.quantized and not error <= limit:
                raise Wrong(f"pixels' rms error {error:.3g} levels, allowed is {limit:.3g}", row)
            start = time.perf_counter()
            pixels(contender.backend, contender.precision)
            seconds = time.perf_counter() - start
            return row | {"seconds": [seconds], "images_per_s": n / seconds}, None

        for contender in contenders:
            row = {"model": name, "contender": contender.name, "batch": n}
            row |= self._guarded(contender, lambda c=contender: measure(c), {})
            self.report.record("pixels", row)


class Wrong(Exception):
    """An output outside its error budget; ``row`` holds what is known of it."""

    def __init__(self, message: str, row: Row) -> None:
        super().__init__(message)
        self.row = row


def _bound(run: Evaluate, x: Tensor) -> Callable[[], Tensor]:
    return lambda: run(x, 1)
