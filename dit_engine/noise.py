"""Where a sampler's random numbers come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class NoiseSource(Protocol):
    def start(self) -> Tensor:
        """The latents that sampling starts from, (N, C, S, S) float32."""
        ...

    def __call__(self, step: int) -> Tensor:
        """The draw of the ``step``-th step taken, (N, C, S, S) float32."""
        ...


class PerImageNoise:
    """One CPU generator an image: its numbers depend on its seed alone.

    Neither the batch, nor the image's place in it, nor the device changes an image.
    """

    def __init__(
        self, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device
    ) -> None:
        self.shape, self.device = shape, device
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def start(self) -> Tensor:
        return self._draw()

    def __call__(self, step: int) -> Tensor:
        return self._draw()

    def _draw(self) -> Tensor:
        draws = [torch.randn(self.shape, generator=g) for g in self.generators]
        return torch.stack(draws).to(self.device)


class OfficialNoise:
    """Random numbers drawn as facebookresearch/DiT draws them.

    One generator on the sampling device; z (N, C, S, S) first; then every step, the last one
    included, one draw for the whole guided batch of 2N, of which the first half is used. Without
    guidance it draws for N, as ``sample_ddp.py`` does. (``sample.py`` seeds before it builds the
    model, whose initial weights use up draws of the CPU's generator: on the CPU its images are
    those of another z.)
    """

    def __init__(
        self, seed: int, n: int, guided: bool, shape: tuple[int, int, int], device: torch.device
    ) -> None:
        self.n, self.batch = n, 2 * n if guided else n
        self.shape, self.device = shape, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.drawn = 0

    def start(self) -> Tensor:
        return self._draw(self.n)

    def __call__(self, step: int) -> Tensor:
        for _ in range(self.drawn, step):  # steps whose draw a sampler had no use for
            self._draw(self.batch)
        self.drawn = step + 1
        return self._draw(self.batch)[: self.n]

    def _draw(self, n: int) -> Tensor:
        return torch.randn(
            (n, *self.shape), generator=self.generator, device=self.device, dtype=torch.float32
        )


class GivenNoise:
    """A noise source whose start or steps (or both) are given tensors.

    Args:
        latents: (N, C, S, S) to start from, or None for ``otherwise.start()``.
        step_noise: (K, N, C, S, S), draw k used at the k-th step taken, or None likewise.
    """

    def __init__(
        self, latents: Tensor | None, step_noise: Tensor | None, otherwise: NoiseSource
    ) -> None:
        self.latents, self.step_noise, self.otherwise = latents, step_noise, otherwise

    def start(self) -> Tensor:
        drawn = self.otherwise.start()  # always, so that the steps' draws stay the same
        return drawn if self.latents is None else self.latents.to(drawn)

    def __call__(self, step: int) -> Tensor:
        if self.step_noise is None:
            return self.otherwise(step)
        return self.step_noise[step]
