"""Check that a model repository holds exactly what this version writes, and no other code.

A server runs the files of its repository: Python, libraries, and whatever a configuration names. We
generate all these files from the facts in repository.json (`model_repository.repository_texts`), so
here they are generated again and compared. The remaining files are the graphs, which are data.

The server gets the generated files, not those in the repository. So later changes to the repository
have no effect, and neither have compiled Python files in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from dit_engine.io.files import file_hash
from dit_engine.io.json_files import check_schema
from dit_engine.io.printable import one_line, printable
from dit_export.bundle import SCHEMA, Bundle
from dit_export.onnx.files import check_contained
from dit_export.server.configuration import GRAPHS, PLATFORMS, ServingOptions
from dit_export.server.repository import (
    MARKER,
    PRODUCER,
    TRUST,
    data_names,
    read_marker,
    repository_texts,
)

_MOVE = "move it elsewhere, or look at it and serve it with --trust"
_UNCOMPARED = {MARKER, "README.md"}  # the first is the source of the facts, the second is not run


def check_repository(path: Path) -> dict[str, bytes]:
    """The generated files of the repository at ``path``: name → content.

    Raises a one-line ValueError for the first file that is not what this version writes, or that
    has changed since it was written.
    """
    marker = read_marker(path)
    if (producer := marker.get("producer")) != PRODUCER:
        raise ValueError(f"{path}: written by {printable(producer)}, not {PRODUCER}: {TRUST}")
    texts, data = _expected(path, marker)
    parents = {str(parent) for name in (*texts, *data) for parent in PurePosixPath(name).parents}
    missing = {*texts, *data} - _UNCOMPARED
    for name, entry in _entries(path):
        if reason := _difference(name, entry, texts, {*data, *_UNCOMPARED}, parents):
            ours = name in {*texts, *data, *_UNCOMPARED, *parents}
            raise ValueError(f"{path / printable(name)}: {reason}: {TRUST if ours else _MOVE}")
        missing.discard(name)
    if missing:
        raise ValueError(
            f"{path / min(missing)}: is missing: write the repository again with --overwrite"
        )
    for name, digest in data.items():
        if file_hash(path / name) != digest:
            raise ValueError(f"{path / name}: has changed since {MARKER} was written: {TRUST}")
    if find_spec("onnx") is not None:  # else onnxruntime alone decides which files a graph may read
        for name, graph in GRAPHS.items():
            if (file := path / name / "1" / "model.onnx").exists():
                check_contained(file, f"{graph}.onnx.data")
    return texts


def served_copy(path: Path, texts: dict[str, bytes], folder: Path) -> Path:
    """A repository in ``folder`` with ``texts``, and links to the files of the graphs. The folders
    are its own, so that what is added to those in ``path`` after the check is not in it."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    for platform in PLATFORMS:
        names, optional = data_names(platform)
        for name in (*names, *optional):
            if (path / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                try:  # without a hard link, onnxruntime may look for the weights elsewhere
                    (folder / name).hardlink_to(path / name)
                except OSError:  # another file system, or a file of another account
                    (folder / name).symlink_to(path.resolve() / name)
    return folder


def _difference(
    name: str, entry: os.DirEntry[str], texts: dict[str, bytes], others: set[str], parents: set[str]
) -> str | None:
    """Why the file or directory ``name`` does not belong there; None if it does.

    others: files whose content is checked elsewhere.
    """
    if entry.is_symlink():
        return "is a link (cp -RL copies what links point to)"
    if name in parents and entry.is_dir():
        return None
    if name in others and entry.is_file():
        return None
    if name not in texts or not entry.is_file():
        return "is not part of what this version writes"
    same = entry.stat().st_size == len(texts[name]) and Path(entry).read_bytes() == texts[name]
    return None if same else "differs from what this version writes"


def _expected(path: Path, marker: dict[str, Any]) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Two dicts: name → content of the generated files, and name → SHA-256 of the graphs' files."""
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
    """What is below ``folder``, as (path from there with "/", entry). Links are not entered. Hidden
    names at the top (.git, .DS_Store) are left out, because they are never served."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = f"{parent}{entry.name}"
            if entry.name == "__pycache__" and parent.startswith("dit/1/"):
                continue  # a server that was started by hand on this repository made it
            if not parent and name.startswith("."):
                continue
            yield name, entry
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(folder / entry.name, f"{name}/")
