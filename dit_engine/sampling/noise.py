"""Where a sampler's random numbers come from: seeds, generators, given tensors."""

from __future__ import annotations

import contextlib
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dit_engine.arguments import sequence, shown, whole_number

_SEED_LIMIT = 2**63
AHEAD = 4
"""Draws that may be on their way to a GPU at once: the host works at most this far ahead."""


class NoiseSource(Protocol):
    """Gives the noise of one batch, on ``device``."""

    device: torch.device

    def start(self) -> Tensor:
        """The latents that sampling starts from, (N, C, S, S) float32."""
        ...

    def __call__(self, step: int) -> Tensor:
        """The noise that the ``step``-th step adds, (N, C, S, S) float32."""
        ...


class Uploads:
    """Copies of CPU numbers to a CUDA device, for which the host does not wait.

    A copy from ordinary memory would first wait until the device has finished all that is queued.
    These copies are made from page-locked buffers, each of which is filled again after its copy.

    Args:
        shape: of each of the float32 tensors.
    """

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        self.shape, self.device = shape, device
        self._ring: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def send(self, fill: Callable[[Tensor], object]) -> Tensor:
        """A tensor on the device with what ``fill`` writes into the buffer that it is given."""
        if len(self._ring) < AHEAD:  # a run without step noise needs only one
            # "blocking": the host sleeps while it waits for the device.
            self._ring.append((_page_locked(self.shape), torch.cuda.Event(blocking=True)))
        else:
            self._ring.rotate(-1)
        buffer, copied = self._ring[-1]  # the one unused for longest
        copied.synchronize()
        fill(buffer)
        sent = buffer.to(self.device, non_blocking=True)
        copied.record(torch.cuda.current_stream(self.device))
        return sent


def _page_locked(shape: Sequence[int]) -> Tensor:
    return torch.empty(*shape, dtype=torch.float32, device="cpu", pin_memory=True)


class PerImageNoise:
    """One CPU generator per image, whose numbers depend on its seed alone.

    Neither the batch, nor the image's place in it, nor the device changes an image.
    """

    def __init__(
        self, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device
    ) -> None:
        self.shape, self.device = (len(seeds), *shape), device
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._uploads: Uploads | None = None

    def start(self) -> Tensor:
        return self(-1)

    def __call__(self, step: int) -> Tensor:
        if self.device.type == "cuda":
            self._uploads = self._uploads or Uploads(self.shape, self.device)
            return self._uploads.send(self._fill)
        drawn = torch.empty(self.shape, dtype=torch.float32, device="cpu")
        self._fill(drawn)
        return drawn.to(self.device)

    def _fill(self, images: Tensor) -> None:
        for image, generator in zip(images, self.generators, strict=True):
            image.normal_(generator=generator)


class OfficialNoise:
    """Random numbers drawn as facebookresearch/DiT draws them.

    One generator on the sampling device draws z (N, C, S, S) first. Then every step, also the last,
    draws for the whole guided batch of 2N, and uses the first half of that. Without guidance it
    draws for N, as ``sample_ddp.py`` does. (``sample.py`` seeds before it builds the
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


def given_noise(name: str, value: Any, shape: tuple[int, ...]) -> Tensor | None:
    """``value``, the argument ``name``, as a float32 tensor of ``shape``; None for None.

    Raises ValueError unless it is a tensor, an array or nested lists of finite floating-point
    numbers in that shape.
    """
    if value is None:
        return None
    given = value
    if not isinstance(value, Tensor):
        with contextlib.suppress(TypeError, ValueError, RuntimeError), np.errstate(over="ignore"):
            array = np.asarray(value)
            if array.dtype.kind == "f":
                value = torch.from_numpy(np.array(array, np.float32, order="C"))
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    if not dense or not value.is_floating_point():
        raise ValueError(f"{name} {shown(given)} is no tensor or array of floating-point numbers")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; {shape} is needed")
    value = value.detach().float()
    if not value.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity")
    return value


class GivenNoise:
    """A noise source whose start or steps (or both) are given tensors.

    Args:
        latents: (N, C, S, S) to start from, or None for ``otherwise.start()``.
        step_noise: (K, N, C, S, S), draw k for the k-th step taken, or None for
            ``otherwise``.
    """

    def __init__(
        self, latents: Tensor | None, step_noise: Tensor | None, otherwise: NoiseSource
    ) -> None:
        self.latents, self.step_noise, self.otherwise = latents, step_noise, otherwise
        self.device = otherwise.device
        self._uploads: Uploads | None = None

    def start(self) -> Tensor:
        drawn = self.otherwise.start()  # always, so that the steps' draws stay the same
        return drawn if self.latents is None else self.latents.to(drawn)

    def __call__(self, step: int) -> Tensor:
        if self.step_noise is None:
            return self.otherwise(step)
        drawn = self.step_noise[step]
        if self.device.type == "cuda" and drawn.device.type == "cpu":
            self._uploads = self._uploads or Uploads(drawn.shape, self.device)
            return self._uploads.send(lambda buffer: buffer.copy_(drawn))
        return drawn


def resolve_seeds(seed: int | None, seeds: Sequence[int] | None, n: int, noise: str) -> list[int]:
    """N seeds: ``seeds``, or from ``seed`` or a random one on; all are one for noise "official"."""
    if seed is not None and seeds is not None:
        raise ValueError(f"seed {shown(seed)} and seeds {shown(seeds)}: give one of the two")
    if noise == "official":
        if seeds is not None:
            raise ValueError("noise 'official' has one generator for the batch: give seed")
        return [_checked_seed("seed", 0 if seed is None else seed)] * n  # the reference's default
    if seeds is not None:
        numbers = sequence(seeds)
        if numbers is None or len(numbers) != n:
            raise ValueError(f"seeds {shown(seeds)}: give one per label ({n}), or seed alone")
        return [_checked_seed("seeds:", each) for each in numbers]
    if sequence(seed) is not None:
        raise ValueError(f"seed {shown(seed)} is not one number: give seeds, one per image")
    start = _checked_seed("seed", secrets.randbelow(2**31) if seed is None else seed)
    if start + n > _SEED_LIMIT:
        raise ValueError(
            f"seed {start} counts up to {start + n - 1} for {n} labels; at most "
            f"{_SEED_LIMIT - n} leaves one for each"
        )
    return [start + i for i in range(n)]


def _checked_seed(name: str, seed: Any) -> int:
    number = whole_number(seed)
    if number is None or not 0 <= number < _SEED_LIMIT:
        allowed = f"a whole number from 0 to {_SEED_LIMIT - 1}"
        raise ValueError(f"{name} {shown(seed)} is not {allowed}")
    return number
