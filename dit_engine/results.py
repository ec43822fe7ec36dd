"""What `Engine.generate` gives: progress on the way, images, the record from which they can be
made again, and files that hold both."""

from __future__ import annotations

import hashlib
import io
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from dit_engine.io.files import atomic_path, save_tensors
from dit_engine.io.json_files import parse_json
from dit_engine.io.printable import printable

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

_CAPTION_HEIGHT = 14
_MARGIN = 4


@dataclass(frozen=True)
class Progress:
    """What a callback is told after every step.

    step counts from 1 to steps. This batch holds ``count`` of the call's ``total`` images, from
    image ``first`` on. latents (count, C, S, S) is the sampler's state: do not change it in place.
    """

    step: int
    steps: int
    first: int
    count: int
    total: int
    latents: Tensor = field(repr=False)


@dataclass(frozen=True)
class Generation:
    """The outcome of `Engine.generate`.

    Attributes:
        images: a list of PIL images, uint8 (N, H, W, 3) for "np", float32 (N, 3, H, W) in [0, 1]
            for "pt", or float32 latents (N, C, S, S) for "latent"; tensors are on the CPU. None if
            the call is only planned.
        labels, seeds: one number per image; seeds is None where all noise was given.
        settings: everything else that is needed to make the images again.
        label_names: the names of the labels, where the model has names.
    """

    images: Any = field(repr=False)
    labels: list[int]
    seeds: list[int] | None
    settings: dict[str, Any] = field(default_factory=dict)
    label_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def save(self, path: str | Path) -> None:
        """Write PIL images with all that is needed to make them again.

        A .png gets the image, or a captioned sheet of several; any other name is a directory, in
        which each image becomes a PNG under the name that dit-generate would give it. Warns of
        files that it replaces.

        Raises ValueError for other outputs than "pil" and for a suffix other than .png, OSError
        for a path that cannot be written.
        """
        from dit_engine.console.output import STDOUT, check_destination, file_name

        path = Path(path)
        if not isinstance(self.images, list):
            raise ValueError(f"{path}: only images of output 'pil' are saved as PNGs")
        if path == STDOUT:
            raise ValueError(f"{path} is no name: give a .png or a directory")
        check_destination(path, suffixes=(".png",))
        if path.suffix.lower() == ".png":
            _write(path, sheet_png(self) if len(self) > 1 else _png(self.images[0]))
            return
        path.mkdir(parents=True, exist_ok=True)
        names, seeds = self.label_names or [None] * len(self), self.seeds or [None] * len(self)
        each = enumerate(zip(self.labels, names, seeds, strict=True))
        targets = [path / file_name(i, *image) for i, image in each]
        if n := sum(target.exists() for target in targets):
            warnings.warn(f"{path} holds {n} of these images, which will be replaced", stacklevel=2)
        for target, image in zip(targets, self.images, strict=True):
            _write(target, _png(image))


def call_record(result: Generation) -> dict[str, Any]:
    """The record of a whole call: settings, labels, their names if there are names, and seeds."""
    record = result.settings | {"labels": result.labels, "seeds": result.seeds}
    return record if result.label_names is None else record | {"label_names": result.label_names}


def image_record(result: Generation, i: int) -> dict[str, Any]:
    """The record of image i alone; "index" is its place in tensors given for the whole call.

    With noise "official", which draws for the batch as a whole, the labels and guidance scales of
    the whole batch are recorded.
    """
    record = dict(result.settings)
    if record["noise"] == "official":
        record["labels"] = result.labels
    elif isinstance(record["guidance_scale"], list):
        record["guidance_scale"] = record["guidance_scale"][i]
    seed = None if result.seeds is None else result.seeds[i]
    if result.label_names is not None:
        record["label_name"] = result.label_names[i]
    return record | {"label": result.labels[i], "seed": seed, "index": i}


def digest(tensor: Tensor) -> str:
    """SHA-256 of a given tensor as float32, so that a record tells which one was used."""
    return hashlib.sha256(tensor.float().cpu().numpy().tobytes()).hexdigest()


def as_read(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` as `record_in` would return it: with lists in place of tuples."""
    return parse_json(json.dumps(record), "the record", lenient=True)


def record_in(image: Image.Image) -> dict[str, Any] | None:
    """The record in a picture's file; None if it holds none."""
    try:
        # A model's path may hold bytes that are not valid UTF-8.
        record = parse_json(image.info["dit_engine"], "the record", lenient=True)
    except (KeyError, TypeError, AttributeError, ValueError):
        return None
    return record if isinstance(record, dict) else None


class Picture(Image.Image):
    """An image whose info holds its record under "dit_engine"; so does its PNG."""

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        if (record := record_in(self)) is not None:  # formats other than PNG ignore it
            params = {"pnginfo": png_text(record)} | params
        super().save(fp, format, **params)


def sign(result: Generation) -> None:
    """Make each of ``result``'s PIL images a `Picture` of its own record."""
    for i, image in enumerate(result.images):
        image.__class__ = Picture
        image.info["dit_engine"] = json.dumps(image_record(result, i))


def png_text(record: dict[str, Any]) -> PngInfo:
    """One text chunk per setting, and all of them as JSON under "dit_engine"."""
    from PIL.PngImagePlugin import PngInfo  # only here, since it takes 20 ms to import

    info = PngInfo()
    for key, value in record.items():
        text = value if isinstance(value, str) else json.dumps(value)
        # Paths may hold bytes that are not valid UTF-8.
        info.add_text(key, text.encode("utf-8", "backslashreplace").decode())
    info.add_text("dit_engine", json.dumps(record))
    return info


def save(
    result: Generation, output: Path, columns: int | None = None, only: int | None = None
) -> None:
    """Write ``result``, made with the `console.output.output_kind` of ``output``, into one file.

    A .png, and standard output for "-", gets one captioned sheet, a .npy the uint8 images
    (N, H, W, 3), a .safetensors the latents (N, C, S, S). All but the .npy hold the record.

    Args:
        columns: of the sheet; None makes it about square.
        only: the index of the one image that a .png gets, in place of a sheet.
    """
    from dit_engine.console.output import STDOUT, write_stdout

    suffix = output.suffix.lower()
    if suffix == ".safetensors":
        record = {"dit_engine": json.dumps(call_record(result))}
        save_tensors({"latents": result.images}, output, record)
    elif suffix == ".npy":
        with atomic_path(output) as partial, partial.open("wb") as file:
            np.save(file, result.images)
    else:
        png = sheet_png(result, columns) if only is None else _png(result.images[only])
        if output == STDOUT:
            write_stdout(png)
        else:
            _write(output, png)


def sheet_png(result: Generation, columns: int | None = None) -> bytes:
    """All images of ``result`` as one captioned sheet with the record of the call."""
    captions = result.label_names or [str(label) for label in result.labels]
    record = call_record(result) | ({} if columns is None else {"columns": columns})
    return _png(make_sheet(result.images, captions, columns), pnginfo=png_text(record))


def make_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int | None = None
) -> Image.Image:
    """Images of one size in a grid, each with its caption below."""
    from PIL import ImageDraw

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


def _png(image: Image.Image, **params: Any) -> bytes:
    png = io.BytesIO()
    image.save(png, "PNG", **params)
    return png.getvalue()


def _write(path: Path, data: bytes) -> None:
    with atomic_path(path) as partial:
        partial.write_bytes(data)
