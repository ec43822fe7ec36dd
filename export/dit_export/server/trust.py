"""Check that a model repository holds exactly what this version writes, and no other code.

A server runs the files of its repository: Python, libraries, and whatever a configuration names. We
generate all of them from the facts in repository.json (`repository.repository_texts`), so here they
are generated again and compared. The other files are the graphs, which are data.

The server gets the generated files, not those in the repository. So neither later changes
to the repository nor compiled Python files in it have an effect.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dit_engine.io.files import file_hash
from dit_engine.io.json_files import check_schema
from dit_engine.io.printable import one_line, printable
from dit_export.bundle import SCHEMA, Bundle
from dit_export.onnx.files import check_contained
from dit_export.server.configuration import ServingOptions
from dit_export.server.repository import (
    MARKER,
    ONNX_FILES,
    PLANS,
    PRODUCER,
    TRUST,
    WEIGHTS,
    read_marker,
    repository_texts,
)

_UNCOMPARED = {MARKER, "README.md"}  # the source of the facts, and a text that is not run


def check_repository(path: Path) -> dict[str, bytes | None]:
    """The files that a server of the repository at ``path`` needs: name → the content, generated
    again, or None for the files of graphs.

    Raises a one-line ValueError for the first file that is not what this version writes, or that
    has changed since it was written.
    """
    marker = read_marker(path)
    if (producer := marker.get("producer")) != PRODUCER:
        raise ValueError(f"{path}: written by {printable(producer)}, not {PRODUCER}: {TRUST}")
    files, hashes = _expected(path, marker)
    there = _entries(path)
    for name in there:
        file = path / name
        if name not in {*files, MARKER} or file.is_symlink() or not file.is_file():
            raise ValueError(
                f"{path / printable(name)}: is a link or not part of what this version writes: "
                f"{TRUST}"
            )
        content = None if name in _UNCOMPARED else files[name]
        if content is None:  # not compared here
            continue
        if file.stat().st_size != len(content) or file.read_bytes() != content:
            raise ValueError(f"{file}: differs from what this version writes: {TRUST}")
    if missing := files.keys() - _UNCOMPARED - {*there}:
        raise ValueError(
            f"{path / min(missing)}: is missing: write the repository again with --overwrite"
        )
    for name, digest in hashes.items():
        if file_hash(path / name) != digest:
            raise ValueError(f"{path / name}: has changed since {MARKER} was written: {TRUST}")
        # Without the package onnx, onnxruntime alone decides which files a graph may read.
        if name in ONNX_FILES and find_spec("onnx") is not None:
            check_contained(path / name, f"{ONNX_FILES[name]}.data")
    return files


def served_copy(path: Path, files: dict[str, bytes | None], folder: Path) -> Path:
    """A repository in ``folder`` of the files that `check_repository` gave. The files of graphs are
    links; the folders are new, so that nothing added to ``path`` after the check is in them."""
    for name, content in files.items():
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            copy.write_bytes(content)
            continue
        try:  # a hard link first: beside a symbolic one, onnxruntime may not find the weights
            copy.hardlink_to(path / name)
        except OSError:  # another file system, or a file of another account
            copy.symlink_to(path.resolve() / name)
    return folder


def _expected(path: Path, marker: dict[str, Any]) -> tuple[dict[str, bytes | None], dict[str, str]]:
    """The result of `check_repository`, and the SHA-256 of each file of a graph."""
    check_schema(marker["export"], SCHEMA, f"{path / MARKER}: cannot be read", "export")
    listed: dict[str, str] = marker["files"]
    try:
        bundle = Bundle.from_manifest(path, marker["export"])
        options = ServingOptions(**marker["options"]).checked()
        texts = {name: text.encode() for name, text in repository_texts(bundle, options).items()}
        weights = [name for name in WEIGHTS if name in listed]
        graphs = PLANS if options.platform == "tensorrt" else [*ONNX_FILES, *weights]
        hashes = {name: listed[name] for name in graphs}
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path / MARKER}: cannot be read: {one_line(repr(error))}") from None
    return texts | dict.fromkeys(hashes), hashes


def _entries(path: Path) -> list[str]:
    """The paths, with "/", of the files and links below ``path``; links are not entered. Left out
    are hidden names at the top (.git, .DS_Store), which are never served, and what a server that
    was started by hand on this repository has compiled."""
    found = []
    for folder, folders, files in os.walk(path):
        inside = Path(folder).relative_to(path)
        names = [*files, *(name for name in folders if Path(folder, name).is_symlink())]
        if inside.parts[:2] == ("dit", "1"):
            folders[:] = [name for name in folders if name != "__pycache__"]
        if not inside.parts:
            folders[:], names = ([n for n in each if n[0] != "."] for each in (folders, names))
        found += [(inside / name).as_posix() for name in names]
    return sorted(found)
