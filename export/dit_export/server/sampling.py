"""The sampling loop in numpy: rows of any sampler and number of steps, side by side in one batch.

It runs where there is no torch, beside the server's Python backend. Shape letters: N rows, C latent
channels, S latent side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

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
        self.x0 = self.silence = np.zeros(shape, dtype=np.float32)

    def inputs(self, step: int) -> dict[str, np.ndarray | float | int]:
        drawn = self.coefficients[step, 8] != 0  # as Engine.generate: only where it is added
        return {
            "z": self.z,
            "x0_before": self.x0,
            "noise": self.generator.randn(self.shape) if drawn else self.silence,
            "t": self.timesteps[step],
            "y": self.row.label,
            "guidance_scale": self.row.scale,
            "coefficients": self.coefficients[step],
        }

    def take(self, step: int, z: np.ndarray, x0: np.ndarray) -> None:
        """The answer to these inputs."""
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
    lost: dict[int, int] | None = None,
) -> np.ndarray:
    """Latents (N, C, S, S) float32, equal to `Engine.generate`'s for the same rows.

    A row that is through its steps leaves the batch, and so does one that is no longer finite.

    Args:
        shape: (C, S, S). learned: whether the model predicts a variance.
        stop: asked before every step; once it is true, the latents are given back as they are.
        diffusion: the model's.
        lost: is given, for each row that is not finite, the first step that was not.

    Raises:
        ValueError: a row's steps, or a spacing that cannot make them.
    """
    runs = [_Run(row, shape, learned, diffusion) for row in rows]
    lost = {} if lost is None else lost
    for k in range(max((row.steps for row in rows), default=0)):
        if stop():
            break
        active = {i: run for i, run in enumerate(runs) if k < run.row.steps and i not in lost}
        if not active:
            break
        columns = [run.inputs(k) for run in active.values()]
        batch = {
            name: np.stack([np.asarray(column[name]) for column in columns])
            for name in columns[0]
        }  # fmt: skip
        integers = {name: batch[name].astype(np.int64) for name in ("t", "y")}
        reals = {name: v.astype(np.float32) for name, v in batch.items() if name not in integers}
        z, x0 = step(reals | integers)
        for (i, run), z_row, x0_row in zip(active.items(), z, x0, strict=True):
            run.take(k, z_row, x0_row)
            if not (np.abs(run.z) < LARGEST).all():
                lost[i] = k
    return np.stack([run.z for run in runs])


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images (N, 3, H, W) in [-1, 1] → uint8 (N, H, W, 3), as `dit_engine.decode.to_uint8`."""
    pixels = np.clip(np.float32(127.5) * images + np.float32(128.0), 0, 255)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1).astype(np.uint8))


_schedule = lru_cache(maxsize=64)(make_schedule)
_coefficients = lru_cache(maxsize=64)(step_coefficients)  # a schedule is equal to itself alone
