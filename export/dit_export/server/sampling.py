"""The sampling loop in numpy: rows of any sampler and number of steps side by side in one batch.

It runs in the Python backend of a server, without torch. Shape letters: N rows, C latent channels,
S latent side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from dit_engine.sampling.coefficients import LARGEST, clipping, step_coefficients
from dit_engine.sampling.diffusion import PUBLISHED_DIFFUSION, Diffusion
from dit_engine.sampling.schedule import make_schedule
from dit_export.server.torch_random import TorchGenerator

Step = Callable[[dict[str, np.ndarray]], tuple[np.ndarray, np.ndarray]]
"""The inputs of the graph ``guided_step`` → (z_next, x0), each (N, C, S, S) float32."""


@dataclass(frozen=True)
class Row:
    """What one image is made from; spacing: see `dit_engine.sampling.schedule.space_timesteps`."""

    label: int
    seed: int
    steps: int
    scale: float
    sampler: str
    spacing: str


class _Run:
    """One row's way through its own schedule."""

    def __init__(
        self, row: Row, shape: tuple[int, int, int], learned: bool, diffusion: Diffusion
    ) -> None:
        self.row, self.shape = row, shape
        schedule = _schedule(row.steps, row.spacing, diffusion)
        self.timesteps = schedule.timesteps  # (steps,)
        self.coefficients = _coefficients(row.sampler, schedule, learned)  # (steps, 9)
        self.clip = clipping(row.sampler, schedule)
        self.generator = TorchGenerator(row.seed)
        self.z = self.generator.randn(shape)  # (C, S, S)
        self.x0 = self.zeros = np.zeros(shape, dtype=np.float32)

    def inputs(self, step: int) -> dict[str, Any]:
        # As in `Engine.generate`, noise is drawn only for the steps that add it.
        drawn = self.coefficients[step, 8] != 0
        return {
            "z": self.z,
            "x0_before": self.x0,
            "noise": self.generator.randn(self.shape) if drawn else self.zeros,
            "t": np.int64(self.timesteps[step]),
            "y": np.int64(self.row.label),
            "guidance_scale": np.float32(self.row.scale),
            "coefficients": self.coefficients[step].astype(np.float32),
        }

    def take(self, step: int, z: np.ndarray, x0: np.ndarray) -> None:
        """Take over the result of a step."""
        if self.clip is not None:
            limit, weights = self.clip
            within = np.where(np.abs(x0) < LARGEST, np.clip(x0, -limit, limit), np.float32("nan"))
            z = z + np.float32(weights[step]) * within
        self.z, self.x0 = z, x0


def sample(
    rows: Sequence[Row],
    shape: tuple[int, int, int],
    learned: bool,
    step: Step,
    stop: Callable[[], bool] = lambda: False,
    diffusion: Diffusion = PUBLISHED_DIFFUSION,
) -> tuple[np.ndarray, dict[int, int]]:
    """Latents (N, C, S, S) float32, as `Engine.generate` makes them from the same rows; and for
    each row that is not finite, its number → the first step that was not finite.

    A row leaves the batch after its last step, or when it is no longer finite.

    Args:
        shape: (C, S, S).
        learned: whether the model predicts a variance.
        stop: is called before every step. Once it returns True, the latents are returned as they
            are.
        diffusion: the model's.

    Raises ValueError for a number of steps that a row's spacing cannot make.
    """
    runs, lost = [_Run(row, shape, learned, diffusion) for row in rows], dict[int, int]()
    for k in range(max((row.steps for row in rows), default=0)):
        active = {i: run for i, run in enumerate(runs) if k < run.row.steps and i not in lost}
        if stop() or not active:
            break
        inputs = [run.inputs(k) for run in active.values()]
        z, x0 = step({name: np.stack([row[name] for row in inputs]) for name in inputs[0]})
        for (i, run), z_row, x0_row in zip(active.items(), z, x0, strict=True):
            run.take(k, z_row, x0_row)
            if not (np.abs(run.z) < LARGEST).all():
                lost[i] = k
    return np.stack([run.z for run in runs]), lost


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images (N, 3, H, W) in [-1, 1] → uint8 (N, H, W, 3), as `dit_engine.decode.to_uint8`."""
    pixels = np.clip(np.float32(127.5) * images + np.float32(128.0), 0, 255)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1).astype(np.uint8))


_schedule = lru_cache(maxsize=64)(make_schedule)
_coefficients = lru_cache(maxsize=64)(step_coefficients)  # a schedule is equal only to itself
