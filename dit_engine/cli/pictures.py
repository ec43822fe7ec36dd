"""Writing what was generated, in the form that the output's name asks for."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dit_engine.console.output import STDOUT, write_stdout
from dit_engine.engine import Generation
from dit_engine.io.files import atomic_path, save_tensors
from dit_engine.io.printable import printable
from dit_engine.metadata import call_record, png_text

_CAPTION_HEIGHT = 14
_MARGIN = 4


def save(
    result: Generation, output: Path, columns: int | None = None, only: int | None = None
) -> None:
    """Write ``result``, made with the `destination.output_kind` of ``output``, into one file.

    A .png, and standard output for "-", gets one captioned sheet, a .npy the uint8 images
    (N, H, W, 3), a .safetensors the latents (N, C, S, S). All but the .npy tell how to make them
    again. Directories are for `dit_engine.cli.series`. columns: of the sheet; None is about square.
    only: the place of the one image that a .png gets, in place of a sheet.
    """
    suffix = output.suffix.lower()
    if suffix == ".safetensors":
        _save_latents(result, output)
    elif suffix == ".npy":
        with atomic_path(output) as partial, partial.open("wb") as file:
            np.save(file, result.images)
    else:
        png = io.BytesIO()
        if only is None:
            captions = result.label_names or [str(label) for label in result.labels]
            sheet = make_sheet(result.images, captions, columns)
            record = call_record(result) | ({} if columns is None else {"columns": columns})
            sheet.save(png, "PNG", pnginfo=png_text(record))
        else:
            result.images[only].save(png, "PNG")
        if output == STDOUT:
            write_stdout(png.getvalue())
            return
        with atomic_path(output) as partial:
            partial.write_bytes(png.getvalue())


def _save_latents(result: Generation, path: Path) -> None:
    record = {"dit_engine": json.dumps(call_record(result))}
    save_tensors({"latents": result.images}, path, record)


def make_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int | None = None
) -> Image.Image:
    """Images of one size in a grid, each with its caption below."""
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
        draw.text((x, y + height * scale + 1), printable(caption), fill="black")
    return sheet
