"""Latents to pixels to pictures."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dit_engine.memory import is_out_of_memory
from dit_engine.vae import AutoencoderKL

if TYPE_CHECKING:
    from PIL import Image


class LatentDecoder:
    """A VAE's decoder on a device, in the precision of the moment; threads may share it."""

    def __init__(self, vae: AutoencoderKL, device: torch.device) -> None:
        self.vae, self.device = vae, device
        self._placed: dict[torch.dtype, AutoencoderKL] = {}
        self._lock = threading.Lock()

    def __call__(self, z: Tensor, precision: str) -> Tensor:
        """Sampler latents z (N, c, h, w) → float32 images (N, 3, H, W), about [-1, 1].

        Decoding is in bfloat16 for precision "bf16", else in float32: Stable Diffusion's decoder
        overflows float16. In float32 on the CPU it goes image by image, so that an image's bits do
        not depend on the batch. When memory runs short it goes image by image too, then tile by
        tile, with a warning (tiles change colours a little).
        """
        vae = self._in_dtype(torch.bfloat16 if precision == "bf16" else torch.float32)
        z = (z / vae.config.scaling_factor).to(vae.post_quant_conv.weight.dtype)
        tile = max(z.shape[-1] // 2, 4)
        attempts: list[tuple[str, Callable[[Tensor], Tensor]]] = [
            ("image by image", vae.decode_sliced),
            ("in tiles", lambda z: vae.decode_tiled(z, tile, tile // 4)),
        ]
        if self.device.type != "cpu" or precision == "bf16":
            attempts.insert(0, ("whole", vae.decode))
        for i, (name, decode) in enumerate(attempts):
            if i > 0:
                warnings.warn(f"out of memory in the VAE: decoding {name}", stacklevel=2)
            try:
                return decode(z).float()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
        raise MemoryError(f"out of memory in the VAE with tiles of {tile} latents")

    def _in_dtype(self, dtype: torch.dtype) -> AutoencoderKL:
        with self._lock:
            if dtype not in self._placed:
                self._placed[dtype] = copy.deepcopy(self.vae).to(self.device, dtype)
            return self._placed[dtype]


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (N, 3, H, W) in [-1, 1] → uint8 (N, H, W, 3), as the reference's sample_ddp.py:
    127.5·x + 128, clamped and truncated."""
    pixels = (127.5 * images + 128.0).clamp(0, 255).permute(0, 2, 3, 1)
    return pixels.to("cpu", torch.uint8).numpy()


def to_pil(pixels: np.ndarray) -> list[Image.Image]:
    """uint8 (N, H, W, 3) → PIL images."""
    from PIL import Image

    return [Image.fromarray(image) for image in pixels]
