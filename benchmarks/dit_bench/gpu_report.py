"""A measurement's record, written after every row: whatever ends the run leaves what was found."""

from __future__ import annotations

import copy
import json
import math
import threading
from pathlib import Path
from typing import Any

from dit_engine.console.output import check_file
from dit_engine.io.files import atomic_path
from dit_engine.io.printable import one_line
from dit_engine.io.provenance import without_paths


class Report:
    """Sections of rows, and single values, that become one JSON object. Threads may share it.

    A row has a "status" of "ok", "failed", "skipped" or "late" (the run did not end in time), and a
    "reason" for all but the first.

    Args:
        path: of the JSON file, which gets its name with `finish`, so that a run that is broken off
            leaves an earlier result there; until then, replaced at every change, it is
            <name>.partial beside it. None keeps all in memory.
        values: what it begins with.
    """

    def __init__(self, path: Path | None, values: dict[str, Any] | None = None) -> None:
        self.final_path = path
        self.path = None if path is None else path.with_name(f"{path.name}.partial")
        self.values: dict[str, Any] = {"complete": False, **(values or {})}
        self._lock = threading.Lock()
        self._write()

    def put(self, key: str, value: Any) -> None:
        with self._lock:
            self.values[key] = value
            self._write()

    def record(self, section: str, row: dict[str, Any]) -> None:
        """Append ``row`` to ``section``."""
        with self._lock:
            self.values.setdefault(section, []).append(row)
            self._write()

    def finish(self) -> None:
        """Give the file its name, in the place of an earlier one."""
        with self._lock:
            if self.path is not None and self.final_path is not None:
                self.path.replace(self.final_path)
            self.path = self.final_path

    def snapshot(self) -> dict[str, Any]:
        """The values as they are now, for a thread that reads while another records."""
        with self._lock:
            return copy.deepcopy(self.values)

    @property
    def failed(self) -> list[dict[str, Any]]:
        return rows_with_status(self.values, "failed")

    def _write(self) -> None:
        if self.path is None:
            return
        text = json.dumps(_finite(without_paths(self.values)), indent=1, allow_nan=False)
        with atomic_path(self.path) as partial:
            partial.write_text(text + "\n", encoding="utf-8")


def rows_with_status(values: dict[str, Any], status: str) -> list[dict[str, Any]]:
    """Rows of every section, in order."""
    sections = [rows for rows in values.values() if isinstance(rows, list)]
    rows = [row for section in sections for row in section if isinstance(row, dict)]
    return [row for row in rows if row.get("status") == status]


def skipped(reason: object) -> dict[str, Any]:
    """The part of a row that says why nothing was measured, in one line."""
    return {"status": "skipped", "reason": one_line(reason)[:300]}


def failure(error: BaseException) -> dict[str, Any]:
    """The part of a row whose measurement ended in ``error``."""
    return {"status": "failed", "reason": f"{type(error).__name__}: {one_line(error)[:300]}"}


def check_report_path(path: Path | None) -> None:
    """Raises a one-line OSError if the report cannot be written there."""
    if path is not None:
        check_file(path)


def _finite(value: Any) -> Any:
    """``value`` with infinities and NaN, which JSON does not have, as text."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
