"""Latents to pixels to pictures."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dit_engine.memory import is_out_of_memory
from dit_engine.vae import AutoencoderKL

if TYPE_CHECKING:
    from PIL import Image


class LatentDecoder:
    """A VAE's decoder in the precision of the moment; safe to share between threads."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self._vaes = {torch.float32: vae}
        self._lock = threading.Lock()

    def __call__(self, z: Tensor, precision: str) -> Tensor:
        """Sampler latents z (N, c, h, w) → float32 images (N, 3, H, W), about [-1, 1].

        Decoding is in bfloat16 for precision "bf16", else in float32: Stable Diffusion's decoder
        overflows float16. When memory runs short it goes image by image, then tile by tile, with
        a warning (tiles change colours a little).
        """
        vae = self._in_dtype(torch.bfloat16 if precision == "bf16" else torch.float32)
        z = (z / vae.config.scaling_factor).to(vae.post_quant_conv.weight.dtype)
        for decode, instead in ((vae.decode, "image by image"), (vae.decode_sliced, "in tiles")):
            try:
                return decode(z).float()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            warnings.warn(f"out of memory in the VAE: decoding {instead}", stacklevel=2)
        return vae.decode_tiled(z).float()

    def _in_dtype(self, dtype: torch.dtype) -> AutoencoderKL:
        with self._lock:
            if dtype not in self._vaes:
                self._vaes[dtype] = copy.deepcopy(self._vaes[torch.float32]).to(dtype)
            return self._vaes[dtype]


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (N, 3, H, W) in [-1, 1] → uint8 (N, H, W, 3), as the reference's sample_ddp.py:
    127.5·x + 128, clamped and truncated."""
    pixels = (127.5 * images + 128.0).clamp(0, 255).permute(0, 2, 3, 1)
    return pixels.to("cpu", torch.uint8).numpy()


def to_pil(pixels: np.ndarray) -> list[Image.Image]:
    """uint8 (N, H, W, 3) → PIL images."""
    from PIL import Image

    return [Image.fromarray(image) for image in pixels]
