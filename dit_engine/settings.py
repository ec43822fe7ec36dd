"""The settings of one `Engine.generate` call, checked before anything is computed."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from dit_engine.arguments import choice, real_number, sequence, shown, whole_number
from dit_engine.backends import PRECISIONS
from dit_engine.config import ModelConfig
from dit_engine.sampling.diffusion import PUBLISHED_DIFFUSION, Diffusion
from dit_engine.sampling.guidance import check_channels, parse_interval
from dit_engine.sampling.samplers import SAMPLERS
from dit_engine.sampling.schedule import SPACINGS, make_schedule

OUTPUTS = ("pil", "np", "pt", "latent")
NOISES = ("per-image", "official")
_SEED_LIMIT = 2**63


@dataclass(frozen=True)
class GenerateSettings:
    sampler: str
    steps: int
    spacing: str
    eta: float
    guidance_channels: int | None
    guidance_interval: tuple[float, float] | None
    noise: str
    precision: str
    backend: str
    output: str

    @classmethod
    def of(
        cls,
        sampler: str,
        steps: int | None,
        spacing: str | None,
        diffusion: Diffusion = PUBLISHED_DIFFUSION,
        **others: Any,
    ) -> GenerateSettings:
        """Settings with the sampler's own number and spacing of steps where None are given."""
        sampler = choice("sampler", sampler, SAMPLERS)
        usual = SAMPLERS[sampler]
        if spacing is not None:
            spacing = diffusion.spacing_for(sampler, choice("spacing", spacing, SPACINGS))
        most = min(usual.default_steps, diffusion.num_train_steps)
        return cls(
            sampler=sampler,
            steps=most if steps is None else steps,
            spacing=usual.spacing if spacing is None else spacing,
            **others,
        )

    @property
    def uses_step_noise(self) -> bool:
        return self.sampler == "ddpm" or self.eta > 0

    def checked(self, config: ModelConfig, has_vae: bool) -> GenerateSettings:
        """Itself with plain Python values, or a ValueError that names the first setting out of its
        range."""
        spacing = choice("spacing", self.spacing, SPACINGS)
        noise = choice("noise", self.noise, NOISES)
        precision = choice("precision", self.precision, PRECISIONS)
        output = choice("output", self.output, OUTPUTS)
        steps = whole_number(self.steps)
        if steps is None or steps.bit_length() > 64:
            allowed = f"an integer from 1 to {config.diffusion.num_train_steps}"
            raise ValueError(f"steps {shown(self.steps)} is not {allowed}")
        make_schedule(steps, spacing, config.diffusion)
        eta = real_number(self.eta)
        if eta is None or not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta {shown(self.eta)} is not in 0 to 1")
        if eta and self.sampler != "ddim":
            raise ValueError(f"eta {eta!r} is for sampler 'ddim', not {self.sampler!r}")
        channels = check_channels(self.guidance_channels, config.in_channels)
        if output != "latent" and not has_vae:
            raise ValueError(f"output {output!r} needs a VAE; without one only 'latent' works")
        interval = self.guidance_interval
        return replace(
            self,
            steps=steps,
            spacing=spacing,
            eta=eta,
            guidance_channels=channels,
            guidance_interval=None if interval is None else parse_interval(interval),
            noise=noise,
            precision=precision,
            output=output,
        )

    def record(self, scales: Tensor) -> dict[str, Any]:
        """What is needed to make the images again, beside labels and seeds."""
        values = asdict(self)
        del values["output"]
        values["guidance_scale"] = scales.tolist() if len(scales.unique()) > 1 else scales[0].item()
        return values


def resolve_seeds(seed: int | None, seeds: Sequence[int] | None, n: int, noise: str) -> list[int]:
    """One seed an image: ``seeds``, or seed, seed + 1, …, or from a random start."""
    if seed is not None and seeds is not None:
        raise ValueError(f"seed {shown(seed)} and seeds {shown(seeds)}: give one of the two")
    if noise == "official":
        if seeds is not None:
            raise ValueError("noise 'official' has one generator for the batch: give seed")
        return [_checked_seed("seed", 0 if seed is None else seed)] * n  # the reference's default
    if seeds is None:
        if (many := sequence(seed)) is not None:
            raise ValueError(f"seed holds {len(many)} numbers: give them as seeds, one an image")
        start = _checked_seed("seed", secrets.randbelow(2**31) if seed is None else seed)
        if start + n > _SEED_LIMIT:
            raise ValueError(
                f"seed {start} counts up to {start + n - 1} for {n} labels; at most "
                f"{_SEED_LIMIT - n} leaves one for each"
            )
        return [start + i for i in range(n)]
    numbers = sequence(seeds)
    if numbers is None:
        raise ValueError(f"seeds {shown(seeds)} is not one number a label: give seed, or a list")
    if len(numbers) != n:
        found = f"{len(numbers)} number{'s' * (len(numbers) != 1)}"
        needed = f"{n} label{'s' * (n != 1)}"
        raise ValueError(f"seeds holds {found} for {needed}; one a label is needed")
    return [_checked_seed("seeds:", each) for each in numbers]


def _checked_seed(name: str, seed: Any) -> int:
    number = whole_number(seed)
    if number is None or not 0 <= number < _SEED_LIMIT:
        raise ValueError(
            f"{name} {shown(seed)} is not a whole number from 0 to {_SEED_LIMIT - 1}"
        )  # fmt: skip
    return number
