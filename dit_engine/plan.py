"""The plan of one `Engine.generate` call: everything that can be checked or computed without the
model, made once before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_engine.arguments import choice, real_number, sequence, shown, whole_number
from dit_engine.backends import PRECISIONS, resolve_backend
from dit_engine.config import NO_NULL_CLASS, ModelConfig
from dit_engine.labels import resolve_labels
from dit_engine.results import Generation, digest, sign
from dit_engine.sampling.coefficients import clipping, step_coefficients
from dit_engine.sampling.noise import given_noise, resolve_seeds
from dit_engine.sampling.samplers import SAMPLERS
from dit_engine.sampling.schedule import SPACINGS, Schedule, make_schedule

OUTPUTS = ("pil", "np", "pt", "latent")
NOISES = ("per-image", "official")
Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Plan:
    """What one call makes: N images in K steps.

    Attributes:
        config: the model's.
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
        """The outcome of the call, with these images (None: they are not made)."""
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
    guidance_interval: Interval | None,
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
        origin: what is recorded about the model.

    Raises:
        ValueError: an argument out of its range; the message names it and what is allowed.
    """
    numbers = resolve_labels(labels, config.num_classes, label_names)
    n, diffusion = len(numbers), config.diffusion
    backend = resolve_backend(backend)
    sampler = choice("sampler", sampler, SAMPLERS)
    usual = SAMPLERS[sampler]
    if spacing is None:
        spacing = usual.spacing
    else:
        spacing = diffusion.spacing_for(sampler, choice("spacing", spacing, SPACINGS))
    noise = choice("noise", noise, NOISES)
    precision = choice("precision", precision, PRECISIONS)
    if output is None:
        output = "pil" if has_vae else "latent"
    if choice("output", output, OUTPUTS) != "latent" and not has_vae:
        raise ValueError(f"output {output!r} needs a VAE; without one only 'latent' works")
    if steps is None:
        steps = min(usual.default_steps, diffusion.num_train_steps)
    schedule = make_schedule(steps, spacing, diffusion)
    eta = _parse_eta(eta, sampler)
    channels = check_channels(guidance_channels, config.in_channels)
    interval = None if guidance_interval is None else parse_interval(guidance_interval)
    scales = parse_scales(guidance_scale, n)
    if not config.has_null_class and (scales != 1).any():
        other = scales[scales != 1][0].item()
        raise ValueError(f"guidance_scale {other:g}: {NO_NULL_CLASS}; give guidance_scale 1")
    image_seeds = resolve_seeds(seed, seeds, n, noise)
    latents = given_noise("latents", latents, (n, *config.latent_shape))
    step_noise = given_noise("step_noise", step_noise, (len(schedule), n, *config.latent_shape))
    settings: dict[str, Any] = {
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
    for name, tensor in (("latents", latents), ("step_noise", step_noise)):
        if tensor is not None:
            settings[f"{name}_sha256"] = digest(tensor)
    names = None if label_names is None else [label_names[i] for i in numbers]
    told = [f"label {i}" for i in numbers]
    if names is not None:
        told = [f"{label} {name!r}" for label, name in zip(told, names, strict=True)]
    return Plan(
        config=config,
        labels=numbers,
        seeds=image_seeds,
        names=[f"image {i} ({told[i]}, seed {image_seeds[i]})" for i in range(n)],
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
        record=origin | settings,
        label_names=names,
    )


def in_interval(interval: Interval | None, sigmas: np.ndarray) -> np.ndarray:
    """(steps,) bool: at which steps guidance is on, namely where low < σ ≤ high.

    sigmas: (steps,) noise levels σ = √((1−ᾱ)/ᾱ), `Schedule.sigmas` (Kynkäänniemi et al. 2024,
    arXiv 2404.07724). high may be infinite; interval None means every step.
    """
    if interval is None:
        return np.ones(len(sigmas), dtype=bool)
    low, high = interval
    return (sigmas > low) & (sigmas <= high)


def parse_interval(interval: Interval) -> Interval:
    """The two bounds as floats. Raises ValueError unless 0 ≤ low < high."""
    bounds = [real_number(bound) for bound in sequence(interval) or ()]
    low, high = bounds if len(bounds) == 2 else (None, None)
    if low is None or high is None or not 0 <= low < high:
        allowed = "a pair (low, high) with 0 ≤ low < high"
        raise ValueError(f"guidance_interval {shown(interval)} is not {allowed}")
    return low, high


def parse_scales(guidance_scale: float | Sequence[float] | Tensor, n: int) -> Tensor:
    """One scale, or one per image, as a float64 tensor (N,).

    Raises ValueError: not finite, negative, or neither one nor ``n`` of them.
    """
    many = sequence(guidance_scale)
    if many is not None and len(many) != n:
        raise ValueError(
            f"guidance_scale {shown(guidance_scale)} for {n} images: give one number, or one per "
            "image"
        )
    scales = []
    for each in [guidance_scale] if many is None else many:
        number = real_number(each)
        if number is None or not 0 <= number < math.inf:
            allowed = "a finite number of 0 or more, or one per image; 1 is no guidance"
            raise ValueError(f"guidance_scale {shown(each)} is not {allowed}")
        scales.append(number)
    return torch.tensor(scales, dtype=torch.float64, device="cpu").expand(n)


def check_channels(channels: int | None, in_channels: int) -> int | None:
    """``channels`` as an int, or None. Raises ValueError unless it is None or 1 … in_channels."""
    number = whole_number(channels)
    if channels is not None and (number is None or not 1 <= number <= in_channels):
        allowed = f"allowed is 1 to {in_channels}"
        raise ValueError(f"guidance_channels {shown(channels)} is out of range: {allowed}")
    return number


def _parse_eta(eta: Any, sampler: str) -> float:
    number = real_number(eta)
    if number is None or not 0.0 <= number <= 1.0:
        raise ValueError(f"eta {shown(eta)} is not in 0 to 1")
    if number and sampler != "ddim":
        raise ValueError(f"eta {number!r} is for sampler 'ddim', not {sampler!r}")
    return number
