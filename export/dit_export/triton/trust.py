"""Whether a model repository holds what this version writes, and no code beside it.

A server runs what lies in its repository: Python, libraries, and whatever a configuration names.
All of it follows from facts in repository.json (`model_repository.repository_texts`), so that it is
made anew and compared. What remains are the graphs, which are data. What is served is the text made
anew, so that it does not matter what becomes of the repository afterwards, nor which compiled files
Python would have found there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from dit_engine.files import file_hash
from dit_engine.json_files import check_schema
from dit_engine.printable import one_line, printable
from dit_export.bundle import SCHEMA, Bundle
from dit_export.bundle_metadata import check_contained
from dit_export.model_repository import (
    MARKER,
    PRODUCER,
    TRUST,
    data_names,
    read_marker,
    repository_texts,
)
from dit_export.triton.configuration import GRAPHS, ServingOptions

_FREE = {MARKER, "README.md"}  # no program reads the second


def check_marker(path: Path) -> None:
    """Raises ValueError where there is no repository.json."""
    if not (path / MARKER).is_file():
        raise ValueError(f"{path}: no model repository; {MARKER} is missing")


def check_repository(path: Path) -> dict[str, bytes]:
    """The texts of the repository at ``path``, by their names.

    Raises a one-line ValueError for the first thing in which it is not what this version writes, or
    has changed since.
    """
    marker = read_marker(path)
    if (producer := marker.get("producer")) != PRODUCER:
        raise ValueError(f"{path}: written by {printable(producer)}, not {PRODUCER}: {TRUST}")
    texts, data = _expected(path, marker)
    parents = {str(parent) for name in (*texts, *data) for parent in PurePosixPath(name).parents}
    missing = {*texts, *data} - _FREE
    for name, entry in _entries(path):
        if reason := _difference(name, entry, texts, {*data, *_FREE}, parents):
            raise ValueError(f"{path / printable(name)}: {reason}: {TRUST}")
        missing.discard(name)
    if missing:
        raise ValueError(f"{path / min(missing)}: is missing")
    for name, digest in data.items():
        if file_hash(path / name) != digest:
            raise ValueError(f"{path / name}: has changed since {MARKER} was written: {TRUST}")
    if find_spec("onnx") is not None:  # without it, onnxruntime is the one to look
        for name, graph in GRAPHS.items():
            if (file := path / name / "1" / "model.onnx").exists():
                check_contained(file, f"{graph}.onnx.data")
    return texts


def served_copy(path: Path, texts: dict[str, bytes], folder: Path) -> Path:
    """A repository in ``folder`` with ``texts``, and links to the folders of the graphs' files."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    for name in GRAPHS:
        (folder / name / "1").symlink_to(path.resolve() / name / "1")
    return folder


def _difference(
    name: str, entry: os.DirEntry[str], texts: dict[str, bytes], others: set[str], parents: set[str]
) -> str | None:
    """others: files whose content is looked at elsewhere."""
    if entry.is_symlink():
        return "is a link"
    if name in parents and entry.is_dir():
        return None
    if name in others and entry.is_file():
        return None
    if name not in texts or not entry.is_file():
        return "is no part of what this version writes"
    same = entry.stat().st_size == len(texts[name]) and Path(entry).read_bytes() == texts[name]
    return None if same else "differs from what this version writes"


def _expected(path: Path, marker: dict[str, Any]) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Name → text, and name → SHA-256 of the graphs' files."""
    check_schema(marker["export"], SCHEMA, f"{path / MARKER}: cannot be read", "export")
    try:
        bundle = Bundle.from_manifest(path, marker["export"])
        options = ServingOptions(**marker["options"]).checked()
        texts = {name: text.encode() for name, text in repository_texts(bundle, options).items()}
        names, optional = data_names(options.platform)
        wanted = [*names, *(name for name in optional if name in marker["files"])]
        return texts, {name: marker["files"][name] for name in wanted}
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path / MARKER}: cannot be read: {one_line(repr(error))}") from None


def _entries(folder: Path, parent: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Name with "/" in it, and entry, of everything below ``folder``; of links nothing below."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = f"{parent}{entry.name}"
            if entry.name == "__pycache__" and parent.startswith("dit/1/"):
                continue  # a server left it that ran the loop where it lies; none of ours does
            yield name, entry
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(folder / entry.name, f"{name}/")
