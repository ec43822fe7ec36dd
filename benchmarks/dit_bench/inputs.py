"""JSON files that a run reads: older reports, and what other measurements have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dit_bench.report import read
from dit_bench.schema import check_operators, validate
from dit_engine.io.json_files import read_json, read_json_value


def read_report(path: Path) -> dict[str, Any]:
    """A report from its JSON. Raises ValueError, which names the file, for what is none."""
    try:
        report = read_json_value(path, pipe=True)
        validate(report)
    except ValueError as error:
        raise ValueError(f"{path} is no report of dit-bench: {error}") from None
    return report


def read_scaling(path: Path) -> dict[str, Any]:
    """A report of the scaling study. Raises ValueError."""
    return read(path, "scaling")


def read_operators(path: Path) -> dict[str, Any]:
    """A report of dit_bench.operators. Raises ValueError."""
    found = read_json(path, pipe=True)
    check_operators(found, path)
    return found
