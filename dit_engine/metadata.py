"""What is written beside pictures and latents: all that is needed to make them again."""

from __future__ import annotations

import json
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dit_engine.io.json_files import parse_json
from dit_engine.results import Generation


def call_record(result: Generation) -> dict[str, Any]:
    """Of a whole call: settings, labels, their names if there are names, and seeds."""
    record = result.settings | {"labels": result.labels, "seeds": result.seeds}
    return record if result.label_names is None else record | {"label_names": result.label_names}


def image_record(result: Generation, i: int) -> dict[str, Any]:
    """Of image i alone; index is its place in tensors that were given for the whole call.

    noise "official" draws for the batch as a whole, so there the whole batch's labels and
    guidance scales are recorded.
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


def as_read(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` as `record_in` would return it: with lists in place of tuples."""
    return parse_json(json.dumps(record), "the record", lenient=True)


def record_in(image: Image.Image) -> dict[str, Any] | None:
    """What a picture's file says of its making; None if it says nothing."""
    try:
        # A model's path may hold bytes that are not valid UTF-8.
        record = parse_json(image.info["dit_engine"], "the record", lenient=True)
    except (KeyError, TypeError, AttributeError, ValueError):
        return None
    return record if isinstance(record, dict) else None


class Picture(Image.Image):
    """An image whose info tells, under "dit_engine", how to make it again; so does its PNG."""

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        if (record := record_in(self)) is not None:  # other formats pay no heed
            params = {"pnginfo": png_text(record)} | params
        super().save(fp, format, **params)


def sign(result: Generation) -> None:
    """Make each of ``result``'s PIL images a `Picture` of its own record."""
    for i, image in enumerate(result.images):
        image.__class__ = Picture
        image.info["dit_engine"] = json.dumps(image_record(result, i))


def png_text(record: dict[str, Any]) -> PngInfo:
    """One text chunk a setting, and all of them as JSON under "dit_engine"."""
    info = PngInfo()
    for key, value in record.items():
        text = value if isinstance(value, str) else json.dumps(value)
        # Paths may hold bytes that are no text.
        info.add_text(key, text.encode("utf-8", "backslashreplace").decode())
    info.add_text("dit_engine", json.dumps(record))
    return info
