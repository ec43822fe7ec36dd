"""The plan of one `Engine.generate` call: everything that can be checked or computed without the
model, made once before anything runs."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from dit_engine.arguments import choice, real_number, sequence, shown, whole_number
from dit_engine.backends import PRECISIONS, resolve_backend
from dit_engine.config import NO_NULL_CLASS, ModelConfig
from dit_engine.labels import resolve_labels
from dit_engine.results import Generation, sign
from dit_engine.sampling.coefficients import clipping, step_coefficients
from dit_engine.sampling.guidance import (
    check_channels,
    in_interval,
    parse_interval,
    parse_scales,
)
from dit_engine.sampling.noise import given_noise
from dit_engine.sampling.samplers import SAMPLERS
from dit_engine.sampling.schedule import SPACINGS, Schedule, make_schedule

OUTPUTS = ("pil", "np", "pt", "latent")
NOISES = ("per-image", "official")
_SEED_LIMIT = 2**63


@dataclass(frozen=True, eq=False)
class Plan:
    """What one call makes: N images in K steps.

    Attributes:
        config: of the model.
        labels, seeds: (N,) one per image. names: (N,) what messages call each image.
        scales: (N,) float64 guidance scales.
        sampler, eta, guidance_channels, noise, backend, precision, output: as `Engine.generate`
            takes them, with the defaults resolved.
        schedule: the K time steps and their noise levels.
        inside: (K,) bool, which steps lie in the guidance interval.
        coefficients, clip: of the sampler (`dit_engine.sampling.coefficients`).
        latents, step_noise: given noise, or None.
        record: all settings that are needed to make the images again, beside labels and seeds.
        label_names: (N,) the names of the labels, where the model has names.
    """

    config: ModelConfig
    labels: list[int]
    seeds: list[int]
    names: list[str]
    scales: Tensor
    sampler: str
    eta: float
    guidance_channels: int | None
    noise: str
    backend: str
    precision: str
    output: str
    schedule: Schedule
    inside: np.ndarray
    coefficients: np.ndarray
    clip: tuple[float, np.ndarray] | None
    latents: Tensor | None
    step_noise: Tensor | None
    record: dict[str, Any]
    label_names: list[str] | None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def guides(self) -> np.ndarray:
        """(K,) bool: at which steps the unconditional half is computed."""
        return self.inside & bool((self.scales != 1).any())

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, S, S) of the latents of one image."""
        return self.config.in_channels, self.config.input_size, self.config.input_size

    @property
    def splittable(self) -> bool:
        """Whether the images may be made in several batches; "official" noise is one draw."""
        return self.noise != "official"

    def part(self, first: int, count: int) -> Plan:
        """The plan of ``count`` of the images, from image ``first`` on."""
        part = slice(first, first + count)
        return replace(
            self,
            labels=self.labels[part],
            seeds=self.seeds[part],
            names=self.names[part],
            scales=self.scales[part],
            latents=None if self.latents is None else self.latents[part],
            step_noise=None if self.step_noise is None else self.step_noise[:, part],
        )

    def result(self, images: Any) -> Generation:
        """The outcome of the call, with these images; None if they are not made."""
        uses_step_noise = self.sampler == "ddpm" or self.eta > 0
        drew = self.latents is None or (uses_step_noise and self.step_noise is None)
        seeds = self.seeds if drew else None
        made = Generation(images, self.labels, seeds, dict(self.record), self.label_names)
        if images is not None and self.output == "pil":
            sign(made)
        return made


def make_plan(
    labels: int | str | Iterable[int | str],
    config: ModelConfig,
    label_names: Sequence[str] | None,
    origin: dict[str, Any],
    has_vae: bool,
    *,
    steps: int | None,
    sampler: str,
    spacing: str | None,
    eta: float,
    guidance_scale: float | Sequence[float] | Tensor,
    guidance_channels: int | None,
    guidance_interval: tuple[float, float] | None,
    seed: int | None,
    seeds: Sequence[int] | None,
    noise: str,
    latents: Any,
    step_noise: Any,
    backend: str,
    precision: str,
    output: str | None,
) -> Plan:
    """Check every argument of `Engine.generate` and compute what follows from them.

    Args:
        config, label_names, has_vae: of the engine's model.
        origin: what is recorded of the model.

    Raises:
        ValueError: an argument out of its range; the message names it and what is allowed.
    """
    numbers = resolve_labels(labels, config.num_classes, label_names)
    n = len(numbers)
    backend = resolve_backend(backend)
    sampler = choice("sampler", sampler, SAMPLERS)
    usual, diffusion = SAMPLERS[sampler], config.diffusion
    if spacing is None:
        spacing = usual.spacing
    else:
        spacing = diffusion.spacing_for(sampler, choice("spacing", spacing, SPACINGS))
    noise = choice("noise", noise, NOISES)
    precision = choice("precision", precision, PRECISIONS)
    if output is None:
        output = "pil" if has_vae else "latent"
    output = choice("output", output, OUTPUTS)
    if steps is None:
        steps = min(usual.default_steps, diffusion.num_train_steps)
    schedule = make_schedule(_steps(steps, diffusion.num_train_steps), spacing, diffusion)
    eta = _eta(eta, sampler)
    channels = check_channels(guidance_channels, config.in_channels)
    if output != "latent" and not has_vae:
        raise ValueError(f"output {output!r} needs a VAE; without one only 'latent' works")
    interval = None if guidance_interval is None else parse_interval(guidance_interval)
    scales = parse_scales(guidance_scale, n)
    if not config.has_null_class and (scales != 1).any():
        other = scales[scales != 1][0].item()
        raise ValueError(f"guidance_scale {other:g}: {NO_NULL_CLASS}; give guidance_scale 1")
    image_seeds = resolve_seeds(seed, seeds, n, noise)
    shape = (config.in_channels, config.input_size, config.input_size)
    latents = given_noise("latents", latents, (n, *shape))
    step_noise = given_noise("step_noise", step_noise, (len(schedule), n, *shape))
    settings = {
        "sampler": sampler,
        "steps": len(schedule),
        "spacing": spacing,
        "eta": eta,
        "guidance_channels": channels,
        "guidance_interval": interval,
        "noise": noise,
        "precision": precision,
        "backend": backend,
        "guidance_scale": scales.tolist() if len(scales.unique()) > 1 else scales[0].item(),
    }
    return Plan(
        config=config,
        labels=numbers,
        seeds=image_seeds,
        names=_image_names(numbers, label_names, image_seeds),
        scales=scales,
        sampler=sampler,
        eta=eta,
        guidance_channels=channels,
        noise=noise,
        backend=backend,
        precision=precision,
        output=output,
        schedule=schedule,
        inside=in_interval(interval, schedule.sigmas),
        coefficients=step_coefficients(sampler, schedule, config.learn_sigma, eta),
        clip=clipping(sampler, schedule),
        latents=latents,
        step_noise=step_noise,
        record=origin | settings | _digests(latents=latents, step_noise=step_noise),
        label_names=None if label_names is None else [label_names[i] for i in numbers],
    )


def resolve_seeds(seed: int | None, seeds: Sequence[int] | None, n: int, noise: str) -> list[int]:
    """One seed per image: ``seeds``, or seed, seed + 1, …, or from a random start."""
    if seed is not None and seeds is not None:
        raise ValueError(f"seed {shown(seed)} and seeds {shown(seeds)}: give one of the two")
    if noise == "official":
        if seeds is not None:
            raise ValueError("noise 'official' has one generator for the batch: give seed")
        return [_checked_seed("seed", 0 if seed is None else seed)] * n  # the reference's default
    if seeds is None:
        if (many := sequence(seed)) is not None:
            raise ValueError(f"seed holds {len(many)} numbers: give them as seeds, one per image")
        start = _checked_seed("seed", secrets.randbelow(2**31) if seed is None else seed)
        if start + n > _SEED_LIMIT:
            raise ValueError(
                f"seed {start} counts up to {start + n - 1} for {n} labels; at most "
                f"{_SEED_LIMIT - n} leaves one for each"
            )
        return [start + i for i in range(n)]
    numbers = sequence(seeds)
    if numbers is None:
        raise ValueError(f"seeds {shown(seeds)} is not one number per label: give seed, or a list")
    if len(numbers) != n:
        found = f"{len(numbers)} number{'s' * (len(numbers) != 1)}"
        needed = f"{n} label{'s' * (n != 1)}"
        raise ValueError(f"seeds holds {found} for {needed}; one per label is needed")
    return [_checked_seed("seeds:", each) for each in numbers]


def _checked_seed(name: str, seed: Any) -> int:
    number = whole_number(seed)
    if number is None or not 0 <= number < _SEED_LIMIT:
        allowed = f"a whole number from 0 to {_SEED_LIMIT - 1}"
        raise ValueError(f"{name} {shown(seed)} is not {allowed}")
    return number


def _steps(steps: Any, most: int) -> int:
    number = whole_number(steps)
    if number is None or number.bit_length() > 64:
        raise ValueError(f"steps {shown(steps)} is not an integer from 1 to {most}")
    return number


def _eta(eta: Any, sampler: str) -> float:
    number = real_number(eta)
    if number is None or not 0.0 <= number <= 1.0:
        raise ValueError(f"eta {shown(eta)} is not in 0 to 1")
    if number and sampler != "ddim":
        raise ValueError(f"eta {number!r} is for sampler 'ddim', not {sampler!r}")
    return number


def _image_names(
    labels: list[int], label_names: Sequence[str] | None, seeds: list[int]
) -> list[str]:
    return [
        f"image {i} (label {label}{f' {label_names[label]!r}' if label_names else ''}, seed {seed})"
        for i, (label, seed) in enumerate(zip(labels, seeds, strict=True))
    ]


def _digests(**tensors: Tensor | None) -> dict[str, str]:
    """SHA-256 of given tensors as float32, so that a record tells which ones were used."""
    return {
        f"{name}_sha256": hashlib.sha256(tensor.float().cpu().numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
        if tensor is not None
    }
