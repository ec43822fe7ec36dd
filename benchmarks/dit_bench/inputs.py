"""JSON files that a run reads: older reports, and what other measurements have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dit_bench.schema import check_operators, validate
from dit_engine.io.json_files import check_schema, read_json, read_json_value

# Schema of a report of dit_bench.scaling: the values that the page shows.
SCALING = {
    "": {"metric": "text", "points": "list"},
    "points[]": {
        "network": "text", "gmacs": "positive", "steps": "number", "distance": "number",
        "n": "number",
    },
}  # fmt: skip


def read_report(path: Path) -> dict[str, Any]:
    """A report from its JSON. Raises ValueError, which names the file, for what is none."""
    try:
        report = read_json_value(path, pipe=True)
        validate(report)
    except ValueError as error:
        raise ValueError(f"{path} is no report of dit-bench: {error}") from None
    return report


def read_scaling(path: Path) -> dict[str, Any]:
    """{"metric": text, "points": [{network, gmacs, steps, distance, n}, …]}. Raises ValueError."""
    found = read_json(path, pipe=True)
    check_schema(found, SCALING, path)
    return found


def read_operators(path: Path) -> dict[str, Any]:
    """A report of dit_bench.operators. Raises ValueError."""
    found = read_json(path, pipe=True)
    check_operators(found, path)
    return found
