"""What the figures have in common: axes, colours, error bars, files.

No state of pyplot is touched, so figures can be made by any thread and on any machine.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_engine.io.files import atomic_path
from dit_engine.io.printable import show_plainly

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#3366cc", "#dc6b19", "#2a9d5c", "#9b4dca", "#c2185b", "#00838f", "#7a6a00", "#555555",
           "#8d6e63", "#26418f", "#ad1457", "#558b2f")  # fmt: skip
MARKERS = "osD^vP<>*X"

Row = dict[str, Any]


def new_figure(title: str, panels: int = 1) -> tuple[Figure, Any]:
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6 if panels == 1 else 14.5, 5.2), dpi=130, layout="constrained")
    axes = figure.subplots(1, panels)
    for each in [axes] if panels == 1 else axes:
        each.grid(True, which="major", color="#dddddd", lw=0.7)
        each.spines[["top", "right"]].set_visible(False)
        each.set_axisbelow(True)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure, axes


def error_bars(
    axes: Axes, xs: list[float], rows: list[Row], name: str, i: int, unit: str,
    line: bool = True, marker: str | None = None,
) -> None:  # fmt: skip
    """Medians with bars from p5 to p95; ``unit`` "ms", or "images_s", whose bars swap ends."""
    middle = [row["ms"]["median"] if unit == "ms" else row["images_s"] for row in rows]
    low, high = [], []
    for row, value in zip(rows, middle, strict=True):
        ms = row["ms"]
        ends = [ms["p5"], ms["p95"]] if unit == "ms" else [
            value * ms["median"] / ms["p95"], value * ms["median"] / ms["p5"]
        ]  # fmt: skip
        low.append(max(0.0, value - ends[0]))
        high.append(max(0.0, ends[1] - value))
    noisy = any(row["noisy"] for row in rows)
    axes.errorbar(
        xs, middle, [low, high], fmt=marker or MARKERS[i % len(MARKERS)], color=colour(i),
        ls="-" if line else "none", lw=1.4, ms=11 if marker else 6, capsize=3,
        label=f"{name} (noisy)" if noisy else name,
    )  # fmt: skip


def log_axes(axes: Any, directions: str) -> None:
    """Logarithmic axes with plain numbers at 1, 2 and 5 of each decade, or at 1 of many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for direction in directions:
        axes.set(**{f"{direction}scale": "log"})
        low, high = axes.get_xlim() if direction == "x" else axes.get_ylim()
        axis = axes.xaxis if direction == "x" else axes.yaxis
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def legend(axes: Axes, below: bool = False) -> None:
    if below:
        axes.legend(fontsize=8, frameon=False, loc="lower right")
        return
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))


def subtitle(axes: Axes, report: dict[str, Any], more: str | None) -> None:
    machine = report["machine"]
    where = machine.get("gpu") if machine["device"].startswith("cuda") else machine["cpu"]
    threads = machine["threads"]
    parts = [where, f"{threads} thread{'s' * (threads > 1)}", more]
    axes.set_title(", ".join(part for part in parts if part), fontsize=9, loc="left")


def ok_rows(report: dict[str, Any], what: str) -> list[Row]:
    return [r for r in report["rows"] if r["section"] == what and r["status"] == "ok"]


def names_of(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["contender"] for row in rows))


def colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def png(figure: Figure) -> bytes:
    return _encoded(figure, "png")


def svg(figure: Figure) -> bytes:
    return _encoded(figure, "svg")


def save_figures(figures: dict[str, Figure], folder: Path) -> list[Path]:
    """A PNG each in ``folder``, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        with atomic_path(path) as partial:
            partial.write_bytes(png(figure))
    return paths


def require_matplotlib() -> None:
    try:
        import matplotlib as _  # noqa: F401
    except ImportError:
        raise ImportError("matplotlib is not installed: pip install 'dit-engine[bench]'") from None


def _encoded(figure: Figure, form: str) -> bytes:
    out = io.BytesIO()
    show_plainly(figure).savefig(out, format=form)
    return out.getvalue()
