"""JSON files that a run reads: older reports, and what other measurements have written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dit_bench.schema import validate

SCALING_KEYS = ("network", "gmacs", "steps", "distance", "n")
OPERATOR_KEYS = ("operator", "shape", "dtype", "impl", "ms", "unit", "bytes", "flops",
                 "percent_of_ceiling")  # fmt: skip


def read_report(path: Path) -> dict[str, Any]:
    """A report from its JSON. Raises ValueError, which names the file, for what is none."""
    _check_there(path)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        validate(report)
    except ValueError as error:  # also of JSON and of UTF-8
        raise ValueError(f"{path} is no report of dit-bench: {error}") from None
    return report


def read_json(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """A JSON object with ``keys``. Raises ValueError, which names the file."""
    _check_there(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    for key in keys:
        if not isinstance(found, dict) or key not in found:
            raise ValueError(f"{path} has no {key!r}")
    return found


def _check_there(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; a JSON file is needed")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; a JSON file is needed")


def read_scaling(path: Path) -> dict[str, Any]:
    """{"metric": text, "points": [{network, gmacs, steps, distance, n}, …]}. Raises ValueError."""
    found = read_json(path, ("metric", "points"))
    for i, point in enumerate(_objects(path, found, "points")):
        for key in SCALING_KEYS:
            if key not in point:
                raise ValueError(f"{path}: points[{i}] has no {key!r}")
    return found


def read_operators(path: Path) -> dict[str, Any]:
    """A report of dit_bench.operators. Raises ValueError."""
    found = read_json(path, ("operators", "ceilings"))
    for i, row in enumerate(_objects(path, found, "operators")):
        if row.get("status") == "ok" and "rate" in row:
            for key in OPERATOR_KEYS:
                if key not in row:
                    raise ValueError(f"{path}: operators[{i}] has no {key!r}: measure again")
    return found


def _objects(path: Path, found: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The list of objects under ``key``. Raises ValueError, which names the file."""
    entries = found[key]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: {key!r} is no list of objects")
    return entries
