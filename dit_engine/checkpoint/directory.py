"""The model directories that are known: native, diffusers pipeline, diffusers transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dit_engine.checkpoint.convert import DIFFUSERS_CLASSES
from dit_engine.checkpoint.saving import NATIVE_CLASS
from dit_engine.checkpoint.weights import find_weights, listing
from dit_engine.io.json_files import read_json, read_json_value
from dit_engine.io.printable import one_line


def open_directory(path: Path) -> tuple[Path, Path | None, tuple[str, ...] | None]:
    """(weight file, VAE directory, label names) of a model's directory."""
    vae = path / "vae" if (path / "vae").is_dir() else None
    if (path / "model_index.json").is_file():
        index = read_json(path / "model_index.json")
        if not (path / "transformer").is_dir():
            name = index.get("_class_name")
            raise ValueError(
                f"{path}: a {one_line(name)} without transformer/; a DiTPipeline is needed"
            )
        names = _names_from_ids(index.get("id2label"), path / "model_index.json")
        return find_weights(path / "transformer"), vae, names
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path}: no model directory; it needs config.json or model_index.json, "
            f"it holds {listing(path)}"
        )
    kind = read_json(path / "config.json", lenient=True).get("_class_name")
    if kind not in (NATIVE_CLASS, *DIFFUSERS_CLASSES):
        known = ", ".join((NATIVE_CLASS, *DIFFUSERS_CLASSES))
        raise ValueError(f"{path}: config.json is of class {kind!r}; known are {known}")
    return find_weights(path), vae, _read_names(path / "labels.json")


def _read_names(path: Path) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    names = read_json_value(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: not a list of names")
    return tuple(names)


def _names_from_ids(ids: Any, path: Path) -> tuple[str, ...] | None:
    """Names in class order from a pipeline's id2label, {"0": "tench, Tinca tinca", …}."""
    if not ids:
        return None
    try:
        return tuple(str(ids[str(i)]) for i in range(len(ids)))
    except (KeyError, TypeError, IndexError):
        raise ValueError(f"{path}: id2label does not name the classes 0, 1, …") from None
