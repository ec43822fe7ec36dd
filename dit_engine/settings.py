"""The settings of one `Engine.generate` call, checked before anything is computed."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Sequence, Sized
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from dit_engine.backends import PRECISIONS
from dit_engine.config import ModelConfig
from dit_engine.diffusion import PUBLISHED_DIFFUSION, Diffusion
from dit_engine.guidance import check_channels, check_interval
from dit_engine.sampler import SAMPLERS
from dit_engine.schedule import SPACINGS, make_schedule

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
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
        usual = SAMPLERS[sampler]
        most = min(usual.default_steps, diffusion.num_train_steps)
        return cls(
            sampler=sampler,
            steps=most if steps is None else steps,
            spacing=usual.spacing if spacing is None else diffusion.spacing_for(sampler, spacing),
            **others,
        )

    @property
    def uses_step_noise(self) -> bool:
        return self.sampler == "ddpm" or self.eta > 0

    def checked(self, config: ModelConfig, has_vae: bool) -> GenerateSettings:
        """Itself, or a ValueError that names the first setting out of its range."""
        for name, value, allowed in (
            ("spacing", self.spacing, SPACINGS),
            ("noise", self.noise, NOISES),
            ("precision", self.precision, PRECISIONS),
            ("output", self.output, OUTPUTS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} {value!r}: choose one of {', '.join(allowed)}")
        make_schedule(self.steps, self.spacing, config.diffusion)
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta {self.eta!r} is not in 0 to 1")
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta {self.eta!r} is for sampler 'ddim', not {self.sampler!r}")
        check_channels(self.guidance_channels, config.in_channels)
        if self.output != "latent" and not has_vae:
            raise ValueError(f"output {self.output!r} needs a VAE; without one only 'latent' works")
        if self.guidance_interval is not None:
            check_interval(self.guidance_interval)
        return self

    def record(self, scales: Tensor) -> dict[str, Any]:
        """What is needed to make the images again, beside labels and seeds."""
        values = asdict(self)
        del values["output"]
        values["guidance_scale"] = scales.tolist() if len(scales.unique()) > 1 else scales[0].item()
        return values


def resolve_seeds(seed: int | None, seeds: Sequence[int] | None, n: int, noise: str) -> list[int]:
    """One seed an image: ``seeds``, or seed, seed + 1, …, or from a random start."""
    if seed is not None and seeds is not None:
        raise ValueError(f"seed {seed} and seeds {list(seeds)}: give one of the two")
    if noise == "official":
        if seeds is not None:
            raise ValueError("noise 'official' has one generator for the batch: give seed")
        start = 0 if seed is None else seed  # the reference's default
        return [_checked(start)] * n
    if seeds is None:
        # A tensor or an array without dimensions is one number.
        if isinstance(seed, Sized) and not isinstance(seed, str) and getattr(seed, "ndim", 1):
            raise ValueError(f"seed holds {len(seed)} numbers: give them as seeds, one an image")
        start = _checked(secrets.randbelow(2**31) if seed is None else seed)
        return [_checked(start + i) for i in range(n)]
    if not hasattr(seeds, "__len__"):
        raise ValueError(f"seeds {seeds!r} is not one number a label: give seed, or a list")
    if len(seeds) != n:
        found = f"{len(seeds)} number{'s' * (len(seeds) != 1)}"
        needed = f"{n} label{'s' * (n != 1)}"
        raise ValueError(f"seeds holds {found} for {needed}; one a label is needed")
    return [_checked(s) for s in seeds]


def _checked(seed: Any) -> int:
    try:
        number = -1 if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < _SEED_LIMIT:
        raise ValueError(f"seed {seed!r} is not a whole number from 0 to {_SEED_LIMIT - 1}")
    return number
