"""Files that a run writes: JSON and CSV here; each whole, or not there at all."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dit_engine.cli.destination import check_file
from dit_engine.files import atomic_path

STDOUT = Path("-")

CSV_COLUMNS = (
    "model", "size", "what", "images", "name", "role", "precision", "status", "reason", "p5_ms",
    "median_ms", "p95_ms", "n", "noisy", "images_s", "gflops", "tflop_s", "percent_of_matmul",
    "percent_of_copy", "flops_per_byte", "bound_by", "setup_s", "first_call_s", "built_mib",
    "peak_mib", "joules_per_image", "error", "bound", "ratio_p5", "ratio_median", "ratio_p95",
    "verdict",
)  # fmt: skip


def check_outputs(paths: Iterable[Path | None]) -> None:
    """Raise a one-line OSError for a file that could not be written, before the long run."""
    for path in paths:
        if path is not None and path != STDOUT:
            check_file(path)


def write_text(text: str, path: Path | None) -> None:
    """To ``path``, to standard output for "-", nowhere for None."""
    if path == STDOUT:
        print(text, end="")
    elif path is not None:
        with atomic_path(path) as partial:
            partial.write_text(text, encoding="utf-8", newline="")


def write_json(report: dict[str, Any], path: Path | None) -> None:
    write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", path)


def csv_text(report: dict[str, Any]) -> str:
    """One line a measurement; the spreads' quantiles are columns of their own."""
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in report["measurements"]:
        flat = dict(row)
        for quantile in ("p5", "median", "p95"):
            if "ms" in row:
                flat[f"{quantile}_ms"] = row["ms"][quantile]
            if "ratio" in row:
                flat[f"ratio_{quantile}"] = row["ratio"][quantile]
        if "ms" in row:
            flat["n"] = row["ms"]["n"]
        writer.writerow(flat)
    return text.getvalue()
