"""The files that show how a training goes: log.csv, loss.png and sheets of images."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor

from dit_engine.io.files import atomic_path, no_links
from dit_engine.io.printable import show_plainly

_MOST_COLUMNS = 16  # in a log; a training writes at most seven


def add_row(path: Path, row: dict[str, float]) -> None:
    """Append a row to a .csv file; the first row writes the names above it."""
    new = not path.exists() or not path.stat().st_size  # a full disk leaves an empty file
    with open(path, "a", encoding="utf-8", newline="", opener=no_links) as file:
        writer = csv.DictWriter(file, row.keys())
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" for k, v in row.items()})


def drop_rows_after(path: Path, step: int) -> None:
    """Remove the rows after ``step``, whose steps will be taken again, and incomplete rows.

    Raises ValueError if the file is not a log: `plot_losses` would draw a panel for each column.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if not lines:
        return
    names = lines[0].split(",")
    if names[0] != "step" or len(names) > _MOST_COLUMNS:
        raise ValueError(f"{path} is not a log of a training: remove it to begin another")

    def is_kept(row: str) -> bool:
        try:
            numbers = [float(text) for text in row.split(",")]
        except ValueError:
            return False
        return len(numbers) == len(names) and numbers[0] <= step

    with atomic_path(path) as partial:
        partial.write_text("\n".join([lines[0], *filter(is_kept, lines[1:])]) + "\n")


def plot_losses(log: Path, picture: Path) -> None:
    """Draw every loss column of a log.csv against the step."""
    rows = []
    if log.exists():
        with log.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    if not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

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


def save_sheet(images: Tensor, path: Path, columns: int) -> None:
    """Write images (N, 3, S, S) in [-1, 1] as one PNG, row by row."""
    from PIL import Image

    n, channels, height, width = images.shape
    rows = -(-n // columns)
    grid = torch.ones(rows * columns, channels, height, width)
    grid[:n] = images.detach().float().cpu().clamp(-1, 1)
    grid = grid.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = (grid.reshape(rows * height, columns * width, channels) + 1) * 127.5
    with atomic_path(path) as partial:
        Image.fromarray(pixels.round().byte().numpy()).save(partial, "PNG")
