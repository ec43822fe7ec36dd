"""Whole generations: the check that each step of them is right.

A trajectory is chaotic: bfloat16 may move one image by 1 % and the next by 20 %, so no bound on the
final image both finds faults and accepts correct images. The error of one step from given latents
hardly varies. So float32 eager takes every step again from the latents that the backend's step
began with (same labels, guidance and draws), and decodes the last latents; the outcomes are
compared. The error of eager bfloat16 in the same step, found in the same way, sets the bound.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dit_bench.contenders import allowed_error, bf16_eager, relative_error
from dit_bench.speed.forward import CHANNELS, SCALE, Work, decoder_precision
from dit_engine.engine import Generation, Progress
from dit_engine.runtime import in_halves
from dit_engine.sampling.guidance import guided
from dit_engine.sampling.noise import PerImageNoise
from dit_engine.sampling.samplers import SAMPLERS
from dit_engine.sampling.schedule import make_schedule

QUANTISED_TIMES_EAGER = 4.0
"""A step's error over that of eager bfloat16 in the same step, also beyond the bounds of one pass,
where guidance enlarges both. (In bf16, of which the built-in model's lean has 1.14 at most in 45
generations of ddpm and ddim, the bound of one pass is enough.)"""
AGAIN_BOUND = 0.5
"""Relative error between the images of two calls of one generation. Most backends give the same
ones to the bit; where sums come in any order, chaos is allowed, another label or seed is not."""


class Recorder:
    """A callback of `Engine.generate` that keeps the latents after every step, on the CPU.

    check: called after every step.
    """

    def __init__(self, check: Callable[[], object] = lambda: None) -> None:
        self._check = check
        self._batches: dict[int, list[Tensor]] = {}

    def __call__(self, progress: Progress) -> None:
        if progress.step == 1:  # also when a batch that did not fit is made again in halves
            self._batches[progress.first] = []
        self._batches[progress.first].append(progress.latents.float().cpu().clone())
        self._check()

    def latents(self) -> Tensor:
        """(steps, N, C, S, S)."""
        parts = [torch.stack(steps) for _, steps in sorted(self._batches.items())]
        return torch.cat(parts, dim=1)


def step_bound(precision: str, bf16_error: float) -> float:
    """The relative error that is allowed of one step, or of the decoding, from eager bfloat16's."""
    times = QUANTISED_TIMES_EAGER if precision in ("int8", "fp8") else 0.0
    return max(allowed_error(precision, bf16_error), times * bf16_error)


class GenerationCheck:
    """The check of the generations of ``work`` with ``steps`` of ``sampler``, by any backend.

    check: called after every step; it may raise KeyboardInterrupt.
    """

    def __init__(
        self, work: Work, steps: int, sampler: str, check: Callable[[], object] = lambda: None
    ) -> None:
        self.work, self.steps, self.sampler, self.check = work, steps, sampler, check
        self._bf16: np.ndarray | None = None

    def __call__(self, name: str, precision: str, generation: Generation) -> tuple[float, float]:
        """(error, bound) of the worst part, relative to its bound. The parts are the steps, the
        decoding, and the difference of ``generation``, made without a callback, from another one
        made with one. An error that is not finite is the worst."""
        errors, images = self.errors(name, precision)
        rounding = np.zeros_like(errors) if precision == "fp32" else self.bf16_errors()
        precisions = [*[precision] * self.steps, decoder_precision(precision)]
        bounds = [step_bound(p, e) for p, e in zip(precisions, rounding, strict=True)]
        errors = np.append(errors, relative_error(self.work.generated(generation), images))
        bounds = np.append(bounds, AGAIN_BOUND)
        worst = int(np.argmax(errors / bounds))  # the first that is not a number, if there is one
        return float(errors[worst]), float(bounds[worst])

    def errors(self, name: str, precision: str) -> tuple[np.ndarray, Tensor]:
        """(steps + 1,) relative errors of every step and of the decoding (0 without a VAE), and the
        images, as `Work.generated` gives them."""
        recorder = Recorder(self.check)
        run = self.work.generation(name, precision, self.steps, self.sampler, recorder)
        images = self.work.generated(run())
        latents, decode = recorder.latents(), self.work.engine._decode
        decoded = latents[-1]
        if decode is not None:
            decoded = decode(decoded.to(self.work.engine.device), "fp32").clamp(-1, 1).cpu()
        pairs = [*zip(latents, self.retaken(latents), strict=True), (images, decoded)]
        return np.array([relative_error(*pair) for pair in pairs]), images

    def bf16_errors(self) -> np.ndarray:
        """`errors` of eager bfloat16, found once."""
        if self._bf16 is None:
            device = self.work.engine.device
            found: np.ndarray = bf16_eager(lambda p: self.errors("eager", p)[0], device)
            self._bf16 = found
        return self._bf16

    def retaken(self, latents: Tensor) -> Tensor:
        """The results (steps, N, C, S, S) of float32 eager's steps, each of which begins with the
        result of the step before in ``latents`` (of the same shape), the first with the noise."""
        engine = self.work.engine
        config, device = engine.config, engine.device
        model, labels = self.work.networks.model(torch.float32), self.work.classes
        schedule = make_schedule(self.steps, SAMPLERS[self.sampler].spacing, config.diffusion)
        timesteps = torch.tensor(schedule.timesteps, device=device)

        def run(first: int, count: int) -> Tensor:
            part = slice(first, first + count)
            null = torch.full_like(labels[part], config.null_class)
            rows = torch.cat([labels[part], null])
            scales = torch.full((count,), SCALE, dtype=torch.float64, device=device)
            denoise = guided(
                lambda x, k: model(x, timesteps[k].expand(len(x)), rows[: len(x)]), scales,
                min(CHANNELS, config.in_channels),
            )  # fmt: skip
            noise = PerImageNoise(self.work.seeds[part], config.latent_shape, device)
            taken: list[Tensor] = []

            def keep(k: int, z: Tensor) -> None:
                taken.append(z.cpu().clone())
                z.copy_(latents[k, part])  # the next step is taken from here
                self.check()

            SAMPLERS[self.sampler].function(denoise, noise.start(), schedule, noise, keep)
            return torch.stack(taken, dim=1)

        count = self.work.images
        return torch.cat(list(in_halves(run, count, engine.max_batch_size))).transpose(0, 1)
