"""Latents to pixels to pictures, and the checks that nothing on the way is NaN or infinite."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dit_engine.backends import Decode
from dit_engine.errors import NotFinite
from dit_engine.runtime import bfloat16_why_not, is_out_of_memory
from dit_engine.sampling.coefficients import LARGEST
from dit_engine.vae import AutoencoderKL

if TYPE_CHECKING:
    from dit_engine.plan import Plan

MakeDecoder = Callable[[AutoencoderKL, torch.dtype, torch.device], Decode | None]
"""`dit_engine.backends.Backend.decoder`."""
_SHOWN = 4
_HELP = (
    "what helps is precision 'bf16' or 'fp32', a smaller guidance_scale, or other weights "
    "(check_finite=True looks for NaN in them)"
)


class LatentDecoder:
    """A VAE's decoder on a device, in the precision of each call. Threads may share it."""

    def __init__(self, vae: AutoencoderKL, device: torch.device) -> None:
        self.vae, self.device = vae, device
        self._made: dict[tuple[MakeDecoder, torch.dtype], Any] = {}
        self._lock = threading.Lock()

    def images(self, z: Tensor, plan: Plan, make: MakeDecoder, at_once: int) -> Any:
        """The latents of all images of ``plan`` (N, C, S, S) as pictures, in the form of its
        ``output``; ``at_once`` images are decoded at a time. Raises `NotFinite`."""
        parts = []
        for first in range(0, len(z), at_once):
            part = slice(first, first + at_once)
            decoded = self(z[part], plan.precision, make)
            if plan.output == "pt":
                check_pixels(decoded, plan.names[part])
                parts.append(decoded.cpu())
            else:
                parts.append(to_uint8(decoded, plan.names[part]))
        if plan.output == "pt":
            return (torch.cat(parts).clamp(-1, 1) + 1) / 2
        pixels = np.concatenate(parts)
        if plan.output == "np":
            return pixels
        from PIL import Image

        return [Image.fromarray(image) for image in pixels]

    def __call__(self, z: Tensor, precision: str, make: MakeDecoder | None = None) -> Tensor:
        """Sampler latents z (N, c, h, w) → float32 images (N, 3, H, W), about [-1, 1].

        Decoding is in float32 for precision "fp32" and "fp16" (Stable Diffusion's decoder overflows
        float16) and on devices without bfloat16, otherwise in bfloat16. In float32 on the CPU
        images are decoded one by one, so that an image's bits do not depend on the batch. If memory
        runs out, images are decoded one by one, then tile by tile, with a warning (tiles change
        colours a little).

        make: the `Backend.decoder` of the backend that sampled; None is the VAE's own decoder.
        """
        wide = precision in ("fp32", "fp16") or bfloat16_why_not(self.device) is not None
        dtype = torch.float32 if wide else torch.bfloat16
        z = self.vae.config.denormalise(z)
        whole = None if make is None else self._cached(make, dtype)
        if whole is None:
            whole = self._cached(_copy, dtype).decode
        tile = max(z.shape[-1] // 2, 4)
        attempts: list[tuple[str, Decode]] = [
            ("image by image", lambda z: torch.cat([whole(part) for part in z.split(1)])),
            ("in tiles", lambda z: self._cached(_copy, dtype).decode_tiled(z, tile, tile // 4)),
        ]
        if self.device.type != "cpu" or dtype != torch.float32:
            attempts.insert(0, ("whole", whole))
        for i, (name, decode) in enumerate(attempts):
            if i > 0:
                warnings.warn(f"out of memory in the VAE: decoding {name}", stacklevel=2)
            try:
                return decode(z.to(dtype)).float()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
        raise MemoryError(f"out of memory in the VAE with tiles of {tile} latents")

    def _cached(self, make: MakeDecoder, dtype: torch.dtype) -> Any:
        with self._lock:
            if (make, dtype) not in self._made:
                self._made[make, dtype] = make(self.vae, dtype, self.device)
            return self._made[make, dtype]


def _copy(vae: AutoencoderKL, dtype: torch.dtype, device: torch.device) -> Any:
    return copy.deepcopy(vae).to(device, dtype)


def to_uint8(images: Tensor, names: Sequence[str] | None = None) -> np.ndarray:
    """Images (N, 3, H, W) in [-1, 1] → uint8 (N, H, W, 3) as in the reference's sample_ddp.py:
    127.5·x + 128, clamped and truncated. Raises `NotFinite` for NaN, which would be black.
    names: see `check_pixels`."""
    check_pixels(images, names)
    pixels = (127.5 * images + 128.0).clamp(0, 255).permute(0, 2, 3, 1)
    # On the images' device: afterwards only a quarter of the bytes is copied from it.
    return pixels.to(torch.uint8, memory_format=torch.contiguous_format).cpu().numpy()


def check_pixels(images: Tensor, names: Sequence[str] | None = None) -> None:
    """Raise `NotFinite` for NaN or infinity in decoded images (N, 3, H, W).

    names: what messages call each image; None numbers them.
    """
    if not _finite(images):
        raise NotFinite(f"{_which(images, names)} not finite after the VAE's decoding: {_HELP}")


def check_latents(
    z: Tensor,
    again: Callable[[Callable[[int, Tensor], None]], Tensor],
    steps: int,
    names: Sequence[str],
) -> None:
    """Raise `NotFinite` for NaN or infinity in the final latents z (N, C, S, S) after ``steps``.

    Then the images are sampled once more by ``again(look)``, which calls ``look(step, latents)``
    at every step, so that the message can tell the first step that is not finite.
    """
    if _finite(z):
        return

    class Found(Exception):
        """Ends the sampling."""

    def look(step: int, z: Tensor) -> None:
        if not _finite(z):
            raise Found(step + 1)

    where = "at the end"
    try:
        again(look)
    except Found as found:
        where = f"from step {found.args[0]} of {steps} on"
    raise NotFinite(f"{_which(z, names)} not finite {where}: {_HELP}")


def _finite(images: Tensor) -> bool:
    """Whether every absolute value is below `LARGEST`; that of NaN is not."""
    return bool((images.abs() < LARGEST).all())


def _which(images: Tensor, names: Sequence[str] | None) -> str:
    """The images that are not finite, as the subject of a sentence."""
    bad = [i for i, image in enumerate(images) if not _finite(image)]
    told = ", ".join(f"image {i}" if names is None else names[i] for i in bad[:_SHOWN])
    more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    return f"{told}{more} {'is' if len(bad) == 1 else 'are'}"
