"""x += y + shift for images in channels-last memory, in place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.triton.launch import launch, power_of_two

_TILE = 4096  # elements


@triton.jit
def _add_shift_kernel(
    x,  # (pixels, C)
    y,  # (pixels, C)
    shift,  # (C,) float32
    pixels,  # N·H·W
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    PIXELS: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * PIXELS
    x += start * C
    y += start * C
    pixel = tl.arange(0, PIXELS)[:, None]
    channel = tl.arange(0, C_PADDED)[None, :]
    offsets = pixel * C + channel
    mask = (start + pixel < pixels) & (channel < C)
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    values += tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
    values += tl.load(shift + channel, mask=channel < C, other=0.0)
    tl.store(x + offsets, values.to(x.dtype.element_ty), mask=mask)


def add_shift(x: Tensor, y: Tensor, shift: Tensor) -> Tensor:
    """x += y + shift in place, for x, y (N, C, H, W) channels-last and shift (C,) float32 → x."""
    if x.numel() > 0:
        channels = x.shape[1]
        pixels, padded = x.numel() // channels, power_of_two(channels)
        at_once = max(_TILE // padded, 1)
        launch(
            _add_shift_kernel, -(-pixels // at_once), x, y, shift, pixels, C=channels,
            C_PADDED=padded, PIXELS=at_once, num_warps=4,
        )  # fmt: skip
    return x
