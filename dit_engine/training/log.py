"""What a training tells while it runs: a progress line, a log of its losses, and their curves."""

from __future__ import annotations

import csv
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dit_engine.console.bars import Bar
from dit_engine.io.files import atomic_path, no_links
from dit_engine.io.printable import show_plainly

if TYPE_CHECKING:
    from dit_engine.training.loop import Budget


_MOST_COLUMNS = 16  # in a log; a training writes at most seven


class ProgressLine:
    """One line: the steps done, the time left and the loss."""

    def __init__(self, description: str, budget: Budget) -> None:
        self._description, self._budget = description, budget
        # In a file every update is a new line, so there are few of them.
        self._interval = 0.2 if sys.stderr.isatty() else 30.0
        self._shown = -math.inf
        self._bar = Bar(total=1.0, bar_format="{desc} |{bar}| {percentage:.0f}%", leave=True)
        self._bar.set_description_str(description)

    def show(self, step: int, seconds: float, loss: float) -> None:
        budget = self._budget
        self._bar.n = budget.progress(step, seconds)
        if time.monotonic() - self._shown < self._interval and self._bar.n < 1.0:
            return
        self._shown = time.monotonic()
        of_all = f" of {budget.steps}" if budget.steps is not None else ""
        left = Bar.format_interval(budget.seconds_left(step, seconds))
        self._bar.set_description_str(
            f"{self._description}: step {step}{of_all}, {left} left, loss {loss:.4f}"
        )

    def close(self) -> None:
        self._bar.close()


def add_row(path: Path, row: dict[str, float]) -> None:
    """Append to a .csv file; the first row writes the names above it."""
    new = not path.exists() or not path.stat().st_size  # a full disk leaves an empty file
    with open(path, "a", encoding="utf-8", newline="", opener=no_links) as file:
        writer = csv.DictWriter(file, row.keys())
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" for k, v in row.items()})


def drop_rows_after(path: Path, step: int) -> None:
    """Forget what was logged after the checkpoint: those steps will be taken again. So are rows
    that were not written whole.

    Raises ValueError if the file is not a log: each of its columns would become a panel.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines:
        return
    header, *rows = lines
    names = header.split(",")
    if names[0] != "step" or len(names) > _MOST_COLUMNS:
        raise ValueError(f"{path} is not a log of a training: remove it to begin another")
    kept = [row for row in rows if len(row.split(",")) == len(names) and _step(row) <= step]
    with atomic_path(path) as partial:
        partial.write_text("\n".join([header, *kept]) + "\n")


def _step(row: str) -> float:
    """The first number of a row; infinity if anything in the row is not a number."""
    try:
        numbers = [float(text) for text in row.split(",")]
    except ValueError:
        return math.inf
    return numbers[0]


def plot_losses(log: Path, picture: Path) -> None:
    """Draw every loss column of a log.csv against the step."""
    if not log.exists():
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with log.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return
    names = [n for n in rows[0] if n not in ("step", "seconds", "lr")]
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        axis.plot([float(r["step"]) for r in rows], [float(r[name]) for r in rows])
        axis.set(title=name, xlabel="step", yscale="log")
        axis.grid(alpha=0.3, which="both")
    show_plainly(figure).tight_layout()
    with atomic_path(picture) as partial:
        figure.savefig(partial, dpi=100, format="png")
    plt.close(figure)
