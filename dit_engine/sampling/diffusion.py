"""Diffusion: what a model was trained to undo, and the sampling rules that came with it.

`dit_engine.checkpoint.scheduler` reads it from a diffusers pipeline, and
`dit_engine.sampling.schedule` computes the steps of a sampler from it. Everything here is plain
Python and numpy in float64.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
VARIANCES = ("model", "fixed_small", "fixed_large")
# The sampler and spacing of a diffusers scheduler, and the name of its time steps in
# `space_timesteps`.
OWN_SPACINGS = {
    "ddim linspace": "even",
    "ddim trailing": "trailing",
    "ddpm linspace": "even",
    "dpm++ leading": "solver-leading",
}

MOST_TRAIN_STEPS = 100_000
FLOAT32 = float(np.finfo(np.float32).max)
LEAST_SIGNAL = 1e-12
"""The smallest ᾱ that the last step may have. Below it, float32 cannot divide by the signal."""


@dataclass(frozen=True)
class Diffusion:
    """The noise that a model was trained with, what it predicts, and how it is meant to be sampled.

    The default is the published diffusion (facebookresearch/DiT ``diffusion/``). The tables hold
    the exact values of their formulas in float64; diffusers rounds each operation to float32.

    Attributes:
        num_train_steps: N. The model knows the time steps 0 … N − 1.
        beta_schedule: how the betas go from ``beta_start`` to ``beta_end``: "linear";
            "scaled_linear", whose square roots are linear (Stable Diffusion); or
            "squaredcos_cap_v2", the cosine of Nichol & Dhariwal 2021, which uses neither bound.
        trained_betas: the N betas themselves, in place of a schedule.
        zero_terminal_snr: rescale the betas so that ᾱ of the last step is 0 (Lin et al. 2023,
            arXiv 2305.08891, algorithm 1). The prediction must not be "epsilon" then, which says
            nothing of x0 at ᾱ = 0.
        prediction: what the model's first C channels are: "epsilon", the noise; "sample", x0; or
            "v_prediction", √ᾱ·epsilon − √(1−ᾱ)·x0 (Salimans & Ho 2022).
        clip: ddpm and ddim clamp the predicted x0 to ±clip; None does not clamp.
        variance: the variance that ddpm uses: "model" is the learned one, or beta where none is
            learned; "fixed_small" is the posterior's and "fixed_large" is beta, in every case.
        steps_offset: this number is added to the time steps of the spacing "leading".
        end_at_first: the last step of ddim goes to ᾱ of step 0, and not to 1 (no noise).
        scheduler: the sampler and spacing, such as "ddim linspace", of a diffusers scheduler whose
            steps differ from our spacing of that name (`OWN_SPACINGS`). With that sampler, the
            name then means the spacing of the scheduler.
    """

    num_train_steps: int = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    trained_betas: tuple[float, ...] | None = None
    zero_terminal_snr: bool = False
    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    clip: float | None = None
    variance: Literal["model", "fixed_small", "fixed_large"] = "model"
    steps_offset: int = 0
    end_at_first: bool = False
    scheduler: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("beta_schedule", BETA_SCHEDULES), ("prediction", PREDICTIONS), ("variance", VARIANCES)
        ):  # fmt: skip
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} {value!r}: choose one of {', '.join(allowed)}")
        _check_whole("num_train_steps", self.num_train_steps, 1, MOST_TRAIN_STEPS)
        _check_whole("steps_offset", self.steps_offset, 0, self.num_train_steps - 1)
        if self.scheduler not in (None, *OWN_SPACINGS):
            raise ValueError(f"scheduler {self.scheduler!r}: known are {', '.join(OWN_SPACINGS)}")
        for name in ("zero_terminal_snr", "end_at_first"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} {getattr(self, name)!r} is neither true nor false")
        for name in ("beta_start", "beta_end"):
            _check_number(name, getattr(self, name), 1.0)
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start {self.beta_start} is above beta_end {self.beta_end}")
        if self.clip is not None:
            _check_number("clip", self.clip, FLOAT32)
            object.__setattr__(self, "clip", float(self.clip))
        if (betas := self.trained_betas) is not None:
            if not isinstance(betas, (list, tuple)):
                raise ValueError(f"trained_betas {betas!r} is not a list of numbers")
            if len(betas) != self.num_train_steps:
                raise ValueError(
                    f"trained_betas holds {len(betas)} numbers for {self.num_train_steps} steps"
                )
            for i, beta in enumerate(betas):
                _check_number(f"trained_betas[{i}]", beta, 1.0)
            object.__setattr__(self, "trained_betas", tuple(betas))  # a list has no hash
        if self.zero_terminal_snr and self.num_train_steps == 1:
            raise ValueError("zero_terminal_snr True needs num_train_steps of 2 or more")
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "zero_terminal_snr True needs prediction 'v_prediction' or 'sample': an epsilon "
                "says nothing of x0 where there is no signal"
            )
        if not self.zero_terminal_snr and not self.alphas_cumprod[-1] >= LEAST_SIGNAL:
            raise ValueError(
                f"the betas leave ᾱ = {self.alphas_cumprod[-1]:.1e} after the last step: "
                f"{LEAST_SIGNAL:.0e} or more is needed"
            )

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """ᾱ_t (N,) float64, t = 0 … N − 1; read-only."""
        bars = np.cumprod(1.0 - self._betas())
        if self.zero_terminal_snr:
            roots = np.sqrt(bars)
            bars = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
        bars.setflags(write=False)
        return bars

    def _betas(self) -> np.ndarray:
        """The betas (N,) before any rescaling."""
        n, low, high = self.num_train_steps, self.beta_start, self.beta_end
        if self.trained_betas is not None:
            return np.array(self.trained_betas, dtype=np.float64)
        if self.beta_schedule == "linear":
            return np.linspace(low, high, n, dtype=np.float64)
        if self.beta_schedule == "scaled_linear":
            return np.linspace(low**0.5, high**0.5, n, dtype=np.float64) ** 2
        edges = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - edges[1:] / edges[:-1], 0.999)

    def spacing_for(self, sampler: str, spacing: str) -> str:
        """The spacing of `dit_engine.sampling.schedule` to use for ``spacing`` with ``sampler``."""
        asked = f"{sampler} {spacing}"
        return OWN_SPACINGS[asked] if asked == self.scheduler else spacing

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Diffusion:
        """The reverse of `to_dict`. ValueError for an unknown key or a value out of its range."""
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"diffusion key {key!r} is unknown; known are {', '.join(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from the published diffusion; empty if none does."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {f.name: values[f.name] for f in fields(self) if values[f.name] != f.default}
        if self.trained_betas is not None:
            changed["trained_betas"] = list(self.trained_betas)
        return changed

    def record(self) -> dict[str, Any]:
        """`to_dict` for the settings of an image: a table of betas is recorded as its SHA-256."""
        values = self.to_dict()
        if (betas := values.pop("trained_betas", None)) is not None:
            digest = hashlib.sha256(json.dumps(betas).encode()).hexdigest()
            values["trained_betas_sha256"] = digest
        return values


def _check_whole(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} {value!r} is not a whole number from {least} to {most}")


def _check_number(name: str, value: Any, end: float) -> None:
    """Raise ValueError unless ``value`` is a number above 0 and below ``end``."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not 0 < value < end:
        allowed = "a finite number above 0" if end == FLOAT32 else f"between 0 and {end:g}"
        raise ValueError(f"{name} {value!r} is not {allowed}")


PUBLISHED_DIFFUSION = Diffusion()
