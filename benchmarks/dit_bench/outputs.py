"""What a run writes: text, JSON and CSV, each file whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dit_engine.console.output import STDOUT, check_destination, check_file, write_stdout
from dit_engine.io.files import atomic_path
from dit_engine.io.printable import printable

CSV_COLUMNS: tuple[str, ...] = (
    "section", "case", "model", "size", "images", "contender", "role", "precision", "status",
    "reason", "p5_ms", "median_ms", "p95_ms", "n", "noisy", "images_s", "gflops", "tflop_s",
    "percent_of_matmul", "percent_of_copy", "flops_per_byte", "bound_by", "setup_s",
    "first_call_s", "built_mib", "peak_mib", "error", "bound", "ratio_p5", "ratio_median",
    "ratio_p95", "verdict", "other_load",
)  # fmt: skip

_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the last are full-width


def check_outputs(paths: Iterable[Path | None]) -> None:
    """Before the long run: raise OSError for a file that cannot be written, and ValueError if two
    outputs would go to the same place."""
    given = [path for path in paths if path is not None]
    for i, path in enumerate(given):
        if path in given[:i]:
            place = "standard output" if path == STDOUT else path
            raise ValueError(f"two outputs cannot both go to {place}: name another file")
        if path != STDOUT:
            check_file(path)


def check_folder(path: Path | None) -> None:
    """Raise a one-line ValueError or OSError for a folder that cannot be written into."""
    if path is None:
        return
    picture = path.suffix.lower() in (".png", ".svg", ".pdf", ".jpg")
    if path.is_file() or (picture and not path.is_dir()):
        raise ValueError(f"{path} is a file; --plot needs a directory, for several pictures")
    check_destination(path / "figures")  # a name without a suffix: a folder, made as needed


def write_text(text: str, path: Path | None) -> None:
    """Write UTF-8 to ``path``, to standard output for "-", nowhere for None."""
    if path == STDOUT:
        write_stdout(text.encode())
    elif path is not None:
        with atomic_path(path) as partial:
            partial.write_text(text, encoding="utf-8", newline="")


def json_text(value: Any) -> str:
    """JSON in ASCII, with escapes for all other characters, so that it is safe to print."""
    return json.dumps(value, indent=1) + "\n"


def finite(value: Any) -> Any:
    """``value`` with None for every NaN and infinity in it, because JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def csv_text(report: dict[str, Any]) -> str:
    """One line per row; the quantiles are columns of their own.

    Text that a spreadsheet would read as a formula gets an apostrophe in front, as OWASP advises.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in report["rows"]:
        flat = row | {f"{key}_ms": value for key, value in row.get("ms", {}).items()}
        flat |= {f"ratio_{key}": value for key, value in row.get("ratio", {}).items()}
        flat["n"] = flat.get("n_ms")
        writer.writerow({column: _cell(value) for column, value in flat.items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text
