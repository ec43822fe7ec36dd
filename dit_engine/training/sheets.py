"""Sheets: many images in one picture."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dit_engine.io.files import atomic_path


def save_sheet(images: Tensor, path: Path, columns: int) -> None:
    """Write images (N, 3, S, S) in [-1, 1] as one PNG, row by row."""
    from PIL import Image

    n, channels, height, width = images.shape
    rows = -(-n // columns)
    grid = torch.ones(rows * columns, channels, height, width)
    grid[:n] = images.detach().float().cpu().clamp(-1, 1)
    grid = grid.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = (grid.reshape(rows * height, columns * width, channels) + 1) * 127.5
    with atomic_path(path) as partial:
        Image.fromarray(pixels.round().byte().numpy()).save(partial, "PNG")
