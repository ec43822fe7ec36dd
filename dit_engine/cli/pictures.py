"""Writing what was generated: PNG files that say how to make them again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dit_engine.engine import Generation
from dit_engine.files import atomic_path

_CAPTION_HEIGHT = 14
_MARGIN = 4


def check_writable(output: Path) -> None:
    """Raise OSError now, and not after minutes of sampling, if ``output`` cannot be written."""
    if output.suffix and output.is_dir():
        raise IsADirectoryError(f"output {output} is a directory; a file name is needed")
    if not output.suffix and output.exists() and not output.is_dir():
        raise NotADirectoryError(f"output {output} is a file; a directory or a .png is needed")
    if output.suffix and output.suffix.lower() not in (".png", ".safetensors"):
        raise ValueError(f"output {output}: use a .png for a sheet, or a directory")
    parent = output.absolute() if output.is_dir() else output.absolute().parent
    while not output.suffix and not parent.exists():
        parent = parent.parent  # directories are made as needed
    if not parent.is_dir():
        raise FileNotFoundError(f"output {output}: {parent} is not a directory")
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"output {output}: {parent} cannot be written")


def save_pictures(
    result: Generation, output: Path, names: Sequence[str] | None, columns: int | None
) -> Path:
    """Write one captioned sheet to a .png, or one file an image into a directory."""
    captions = [names[label] if names else str(label) for label in result.labels]
    if output.suffix.lower() == ".png":
        _save_png(make_sheet(result.images, captions, columns), output, _sheet_record(result))
        return output
    output.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(result.images):
        name = f"{i:05d}-{captions[i]}-seed{result.seeds[i]}.png"
        _save_png(image, output / name, _image_record(result, i))
    return output


def save_latents(result: Generation, output: Path) -> Path:
    """Write latents (N, C, S, S) with their settings as .safetensors."""
    from safetensors.torch import save_file

    path = output.with_suffix(".safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        record = {"dit_engine": json.dumps(_sheet_record(result))}
        save_file({"latents": result.images.cpu().contiguous()}, partial, record)
    return path


def make_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int | None = None
) -> Image.Image:
    """Images of one size in a grid, each with its caption below."""
    if columns is not None and columns < 1:
        raise ValueError(f"columns {columns} is not a positive integer")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    width, height = images[0].size
    scale = max(1, 128 // width)  # small images are shown enlarged, pixel by pixel
    cell_width = width * scale + _MARGIN
    cell_height = height * scale + _CAPTION_HEIGHT + _MARGIN
    rows = math.ceil(len(images) / columns)
    size = (columns * cell_width + _MARGIN, rows * cell_height + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = i % columns * cell_width + _MARGIN
        y = i // columns * cell_height + _MARGIN
        enlarged = image.resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (x, y))
        draw.text((x, y + height * scale + 1), caption, fill="black")
    return sheet


def _image_record(result: Generation, i: int) -> dict[str, Any]:
    record = dict(result.settings)
    if isinstance(record["guidance_scale"], list):
        record["guidance_scale"] = record["guidance_scale"][i]
    return record | {"label": result.labels[i], "seed": result.seeds[i]}


def _sheet_record(result: Generation) -> dict[str, Any]:
    return result.settings | {"labels": result.labels, "seeds": result.seeds}


def _save_png(image: Image.Image, path: Path, record: dict[str, Any]) -> None:
    """Save with one text chunk a setting, and all of them as JSON under "dit_engine"."""
    info = PngInfo()
    for key, value in record.items():
        info.add_text(key, value if isinstance(value, str) else json.dumps(value))
    info.add_text("dit_engine", json.dumps(record))
    with atomic_path(path) as partial:
        image.save(partial, "PNG", pnginfo=info)


def read_tensor(path: Path | None) -> Tensor | None:
    """The one tensor in a .npy or .safetensors file, float32."""
    if path is None:
        return None
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path, allow_pickle=False)).float()
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: use a .npy or a .safetensors file")
    from safetensors.torch import load_file

    tensors = load_file(path)
    if len(tensors) != 1:
        raise ValueError(f"{path} holds {sorted(tensors)}; one tensor is needed")
    return next(iter(tensors.values())).float()
