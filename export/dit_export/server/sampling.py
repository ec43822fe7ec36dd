"""The sampling loop in numpy: rows with different samplers and numbers of steps in one batch.

It runs in the Python backend of a server, without torch, but with the random numbers of torch on
the CPU. Shape letters: N rows, C latent channels, S latent side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from dit_engine.sampling.coefficients import LARGEST, clipping, step_coefficients, uses_noise
from dit_engine.sampling.diffusion import Diffusion
from dit_engine.sampling.schedule import make_schedule

_BLOCK = 16
Step = Callable[[dict[str, np.ndarray]], tuple[np.ndarray, np.ndarray]]
"""The inputs of the graph ``guided_step`` → (z_next, x0), each (N, C, S, S) float32."""


@dataclass(frozen=True)
class Facts:
    """What pipeline.json says about the model that is served.

    Attributes:
        shape: (C, S, S) of the latents.
        learn_sigma: whether the model predicts a variance.
        samplers: name → [usual number of steps, spacing].
    """

    shape: tuple[int, int, int]
    learn_sigma: bool
    num_classes: int
    label_names: list[str] | None
    samplers: dict[str, list[Any]]
    diffusion: Diffusion


class Row:
    """One image on its way through its own schedule.

    Raises ValueError for a number of steps that the sampler's spacing cannot make.
    """

    def __init__(
        self, facts: Facts, label: int, seed: int, steps: int, scale: float, sampler: str
    ) -> None:
        self.label, self.steps, self.scale = label, steps, scale
        spacing = facts.samplers[sampler][1]
        plan = _plan(sampler, steps, spacing, facts.diffusion, facts.learn_sigma)
        self.timesteps, self.coefficients, self.clip = plan
        self.draws = uses_noise(self.coefficients)
        self.generator = TorchGenerator(seed)
        self.z = self.generator.randn(facts.shape)  # (C, S, S)
        self.x0 = self.zeros = np.zeros_like(self.z)
        self.finite = True

    def inputs(self, step: int) -> dict[str, Any]:
        # As in `Engine.generate`, noise is drawn only for the steps that add it.
        noise = self.generator.randn(self.z.shape) if self.draws[step] else self.zeros
        return {
            "z": self.z,
            "x0_before": self.x0,
            "noise": noise,
            "t": np.int64(self.timesteps[step]),
            "y": np.int64(self.label),
            "guidance_scale": np.float32(self.scale),
            "coefficients": self.coefficients[step].astype(np.float32),
        }

    def take(self, step: int, z: np.ndarray, x0: np.ndarray) -> None:
        """Store the result of a step. A latent that is not finite makes the whole row NaN."""
        if self.clip is not None:
            limit, weights = self.clip
            within = np.where(np.abs(x0) < LARGEST, np.clip(x0, -limit, limit), np.float32("nan"))
            z = z + np.float32(weights[step]) * within
        self.finite = bool((np.abs(z) < LARGEST).all())
        self.z, self.x0 = z if self.finite else np.full_like(z, np.nan), x0


@lru_cache(maxsize=64)
def _plan(
    sampler: str, steps: int, spacing: str, diffusion: Diffusion, learned: bool
) -> tuple[np.ndarray, np.ndarray, tuple[float, np.ndarray] | None]:
    """Time steps (steps,), coefficients (steps, 9) and `clipping`."""
    schedule = make_schedule(steps, spacing, diffusion)
    table = step_coefficients(sampler, schedule, learned)
    return schedule.timesteps, table, clipping(sampler, schedule)


def sample(rows: Sequence[Row], step: Step, stop: Callable[[], bool] = lambda: False) -> np.ndarray:
    """Latents (N, C, S, S) float32, as `Engine.generate` makes them from the same rows; NaN for
    rows that are not finite.

    A row leaves the batch after its last step, or when it is no longer finite.

    stop: is called before every step. Once it returns True, the latents are returned as they are.
    """
    for k in range(max(row.steps for row in rows)):
        active = [row for row in rows if k < row.steps and row.finite]
        if stop() or not active:
            break
        inputs = [row.inputs(k) for row in active]
        z, x0 = step({name: np.stack([each[name] for each in inputs]) for name in inputs[0]})
        for row, z_row, x0_row in zip(active, z, x0, strict=True):
            row.take(k, z_row, x0_row)
    return np.stack([row.z for row in rows])


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images (N, 3, H, W) in [-1, 1] → uint8 (N, H, W, 3), as `dit_engine.decode.to_uint8`."""
    pixels = np.clip(np.float32(127.5) * images + np.float32(128.0), 0, 255)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1).astype(np.uint8))


class TorchGenerator:
    """``torch.Generator().manual_seed(seed)``, which uses only the lower 32 bits of the seed: the
    Mersenne Twister (Matsumoto & Nishimura 1998)."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.MT19937()
        np.random.RandomState(self._bits).seed(seed & 0xFFFFFFFF)  # by Knuth's recurrence

    def randn(self, shape: tuple[int, ...]) -> np.ndarray:
        """``torch.randn(shape, generator=…)``, float32.

        The numbers are equal to torch's within the rounding of float32, because torch's vectorised
        logarithm and sine are not exact in the last bit. Raises ValueError for fewer than 16
        numbers, which torch makes in another way.
        """
        size = math.prod(shape)
        if size < _BLOCK:
            raise ValueError(f"noise of shape {shape}: at least {_BLOCK} numbers are needed")
        numbers = self._uniform(size)
        whole = size - size % _BLOCK
        numbers[:whole] = _box_muller(numbers[:whole])
        if whole < size:  # torch draws the last 16 numbers again
            numbers[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return numbers.reshape(shape)

    def _uniform(self, size: int) -> np.ndarray:
        """Numbers in [0, 1), float32, from the lower 24 bits of each word."""
        words = self._bits.random_raw(size) & 0xFFFFFF
        return words.astype(np.float32) * np.float32(2.0**-24)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    """Blocks of 8 and 8 uniform numbers → blocks of 8 cosines and 8 sines (Box & Muller 1958)."""
    first, second = np.moveaxis(uniform.reshape(-1, 2, _BLOCK // 2), 1, 0)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - first))
    angle = np.float32(2.0 * math.pi) * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
