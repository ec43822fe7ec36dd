"""Figures of a report. Each function gives one matplotlib Figure, or None without data for it.

No state of pyplot is touched, so figures can be made by any thread and on any machine.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_engine.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#3366cc", "#dc6b19", "#2a9d5c", "#9b4dca", "#c2185b", "#00838f", "#7a6a00", "#555555",
           "#8d6e63", "#26418f", "#ad1457", "#558b2f")  # fmt: skip
MARKERS = "osD^vP<>*X"

Row = dict[str, Any]


def all_figures(report: dict[str, Any], scaling: dict[str, Any] | None) -> dict[str, Figure]:
    """File stem → figure, of everything that there is data for."""
    made = {
        "latency-gflops": latency_figure(report),
        "throughput-images": throughput_figure(report),
        "roofline": roofline_figure(report),
        "distance-gflops": None if scaling is None else distance_figure(scaling),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def latency_figure(report: dict[str, Any]) -> Figure | None:
    """Time of one forward against its multiply-adds: every model, at its fewest images."""
    rows = _ok(report, "forward")
    if not rows:
        return None
    fewest = min(row["images"] for row in rows)
    rows = [row for row in rows if row["images"] == fewest]
    figure, axes = _figure("Latency against Gflops")
    unet = [row for row in rows if row["role"] == "other network"]
    names = _names(row for row in rows if row not in unet)
    for i, name in enumerate(names):
        series = sorted((r for r in rows if r["name"] == name), key=lambda r: r["gflops"])
        _errorbar(axes, [r["gflops"] / 2 for r in series], series, name, i, "ms")
        if i == 0:
            for row in series:
                axes.annotate(row["model"], (row["gflops"] / 2, row["ms"]["median"]),
                              textcoords="offset points", xytext=(6, -12), fontsize=8)  # fmt: skip
    for i, name in enumerate(_names(unet)):
        # Timed beside every model; one point each, on one vertical line.
        series = [row for row in unet if row["name"] == name]
        xs = [row["gflops"] / 2 for row in series]
        _errorbar(axes, xs, series, name, len(names) + i, "ms", line=False, marker="*")
    _log(axes, "xy")
    axes.set_xlabel("multiply-adds of one forward, 10⁹ (the paper's Gflops)")
    axes.set_ylabel("one forward, ms (median, 5–95 %)")
    _legend(axes)
    _subtitle(axes, report, f"{fewest} image{'s' * (fewest > 1)}")
    return figure


def throughput_figure(report: dict[str, Any]) -> Figure | None:
    """Images a second against the number of images, of a guided step or else of a forward."""
    rows = _ok(report, "step") or _ok(report, "forward")
    if not rows:
        return None
    what = {"step": "guided steps", "forward": "forwards"}[rows[0]["what"]]
    figure, axes = _figure("Throughput against batch")
    many = len({row["model"] for row in rows}) > 1

    def label(row: Row) -> str:
        return f"{row['model']} {row['name']}" if many else row["name"]

    for i, name in enumerate(dict.fromkeys(map(label, rows))):
        series = sorted((r for r in rows if label(r) == name), key=lambda r: r["images"])
        _errorbar(axes, [r["images"] for r in series], series, name, i, "images_s")
    images = sorted({row["images"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(images, [str(n) for n in images])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("images at once")
    axes.set_ylabel(f"{what} of one image, a second (median, 5–95 %)")
    _legend(axes)
    _subtitle(axes, report, None if many else rows[0]["model"])
    return figure


def roofline_figure(report: dict[str, Any]) -> Figure | None:
    """What was reached beside what the machine can do.

    On the left FLOP/s against FLOPs a byte, of networks and of operators that multiply matrices;
    on the right, where there are any, GB/s against the bytes moved, of operators that do not.
    """
    ceilings = report["ceilings"]
    networks = [row for row in _ok(report, "forward") if "flops_per_byte" in row]
    operators = _operator_rows(report)
    if ceilings is None or not (networks or operators):
        return None
    moving = [row for row in operators if row["unit"] == "GB/s"]
    figure, axes = _figure("Roofline", panels=2 if moving else 1)
    left = axes[0] if moving else axes
    multiplying = [row for row in operators if row["unit"] == "TFLOP/s"]
    points = [(r["flops_per_byte"], r["tflop_s"]) for r in networks]
    points += [(r["flops"] / r["bytes"], r["rate"]) for r in multiplying]
    _roofs(left, ceilings, [x for x, _ in points])
    for i, name in enumerate(_names(networks)):
        series = [row for row in networks if row["name"] == name]
        left.plot([r["flops_per_byte"] for r in series], [r["tflop_s"] for r in series],
                  MARKERS[0], ms=8, mfc="none", mew=1.6, color=_colour(i),
                  label=f"{name} forward")  # fmt: skip
    _scatter_operators(left, multiplying, lambda r: (r["flops"] / r["bytes"], r["rate"]))
    _log(left, "xy")
    left.set_xlabel("FLOPs a byte of least traffic (networks: of the weights)")
    left.set_ylabel("TFLOP/s")
    if moving:
        right = axes[1]
        _scatter_operators(right, moving, lambda r: (r["bytes"] / 2**20, r["rate"]))
        right.axhline(ceilings["copy_gb_s"], color="black", lw=1.2)
        right.annotate("large copy", (0.02, ceilings["copy_gb_s"]), fontsize=8, va="bottom",
                       xycoords=("axes fraction", "data"))  # fmt: skip
        _log(right, "xy")
        right.set_xlabel("least traffic, MiB (small ones stay in the caches)")
        right.set_ylabel("GB/s")
        _legend(right)
        _legend(left, below=True)
    else:
        _legend(left)
    _subtitle(left, report, None)
    return figure


def distance_figure(scaling: dict[str, Any]) -> Figure | None:
    """Distance against Gflops, one line a number of training steps (`read_scaling`)."""
    points = scaling["points"]
    if not points:
        return None
    figure, axes = _figure(f"{scaling['metric']} against Gflops")
    for i, steps in enumerate(sorted({point["steps"] for point in points})):
        chosen = sorted((p for p in points if p["steps"] == steps), key=lambda p: p["gmacs"])
        axes.plot([p["gmacs"] for p in chosen], [p["distance"] for p in chosen],
                  MARKERS[i % len(MARKERS)], color=_colour(i), ms=7,
                  label=f"{steps} training steps")  # fmt: skip
        for p in chosen:
            axes.annotate(p["network"], (p["gmacs"], p["distance"]), fontsize=8,
                          textcoords="offset points", xytext=(6, 4))  # fmt: skip
    counts = sorted({point["n"] for point in points})
    _log(axes, "x")
    axes.set_xlabel("multiply-adds of one forward, 10⁹ (the paper's Gflops)")
    axes.set_ylabel(f"{scaling['metric']}, N = {', '.join(map(str, counts))}")
    axes.margins(x=0.15)
    _legend(axes)
    return figure


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


def _figure(title: str, panels: int = 1) -> tuple[Figure, Any]:
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


def _errorbar(
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
        xs, middle, [low, high], fmt=marker or MARKERS[i % len(MARKERS)], color=_colour(i),
        ls="-" if line else "none", lw=1.4, ms=11 if marker else 6, capsize=3,
        label=f"{name} (noisy)" if noisy else name,
    )  # fmt: skip


def _roofs(axes: Axes, ceilings: dict[str, Any], xs: Iterable[float]) -> None:
    """The copy's slope, and a flat roof for every dtype."""
    rates: dict[str, float] = ceilings["matmul_tflop_s"]
    slope = ceilings["copy_gb_s"] / 1e3  # TFLOP/s at one FLOP a byte
    corners = [rate / slope for rate in rates.values()] or [1.0]
    low, high = min([*xs, *corners]) / 4, max([*xs, *corners]) * 4
    for i, (kind, rate) in enumerate(sorted(rates.items(), key=lambda item: -item[1])):
        corner = rate / slope
        start = low if i == 0 else corner
        axes.plot([start, corner, high], [start * slope, rate, rate], color="black", lw=1.2,
                  ls="-" if i == 0 else "--")  # fmt: skip
        axes.annotate(f"{kind} matrix product", (high, rate), fontsize=8, ha="right", va="bottom")
    axes.annotate("copy", (low, low * slope), fontsize=8, textcoords="offset points",
                  xytext=(6, 2))  # fmt: skip


def _scatter_operators(
    axes: Axes, rows: list[Row], place: Callable[[Row], tuple[float, float]]
) -> None:
    kinds = list(dict.fromkeys(row["operator"] for row in rows))
    for i, kind in enumerate(kinds):
        points = [place(row) for row in rows if row["operator"] == kind]
        axes.plot(*zip(*points, strict=True), MARKERS[1 + i % (len(MARKERS) - 1)], ls="none",
                  ms=5, alpha=0.8, color=_colour(i + 3), label=kind)  # fmt: skip


def _operator_rows(report: dict[str, Any]) -> list[Row]:
    """Those of the project's own implementations that were timed."""
    rows = report.get("operators", {}).get("operators", [])
    return [r for r in rows if r.get("status") == "ok" and "rate" in r and not r.get("opponent")]


def _log(axes: Any, directions: str) -> None:
    """Logarithmic axes with plain numbers at 1, 2 and 5 of each decade, or at 1 of many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for direction in directions:
        axes.set(**{f"{direction}scale": "log"})
        low, high = axes.get_xlim() if direction == "x" else axes.get_ylim()
        axis = axes.xaxis if direction == "x" else axes.yaxis
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(axes: Axes, below: bool = False) -> None:
    if below:
        axes.legend(fontsize=8, frameon=False, loc="lower right")
        return
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))


def _subtitle(axes: Axes, report: dict[str, Any], more: str | None) -> None:
    hardware, settings = report["environment"]["hardware"], report["settings"]
    where = hardware.get("gpu") if settings["device"].startswith("cuda") else hardware["cpu"]
    threads = settings["threads"]
    parts = [where, f"{threads} thread{'s' * (threads > 1)}", more]
    axes.set_title(", ".join(part for part in parts if part), fontsize=9, loc="left")


def _ok(report: dict[str, Any], what: str) -> list[Row]:
    return [r for r in report["measurements"] if r["what"] == what and r["status"] == "ok"]


def _names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["name"] for row in rows))


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _encoded(figure: Figure, form: str) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format=form)
    return out.getvalue()
