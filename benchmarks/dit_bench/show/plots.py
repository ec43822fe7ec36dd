"""Figures of a report: each function gives one, or None where there is no data for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from dit_bench.report import NO_VERDICT
from dit_bench.show.drawing import (
    MARKERS,
    Row,
    colour,
    error_bars,
    legend,
    log_axes,
    names_of,
    new_figure,
    ok_rows,
    subtitle,
)
from dit_engine.io.printable import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def all_figures(report: dict[str, Any], scaling: dict[str, Any] | None) -> dict[str, Figure]:
    """File stem → figure, of everything that there is data for; the first is what a run is for."""
    made = {
        "ratio": ratio_figure(report),
        "latency-gflops": latency_figure(report),
        "throughput-images": throughput_figure(report),
        "roofline": roofline_figure(report),
        "distance-gflops": None if scaling is None else distance_figure(scaling),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


CAPTIONS = {
    "ratio": "How long each took, as a multiple of the first's time in the same rounds.",
    "latency-gflops": "Each point is the time of one forward at the multiply-adds of its model.",
    "throughput-images": "How many images a second are computed, by how many are computed at once.",
    "roofline": "What was reached stands below what the machine can do at most.",
    "distance-gflops": "Each point is a model's distance to real images at its multiply-adds.",
}


def ratio_figure(report: dict[str, Any]) -> Figure | None:
    """Bars of every peer's time over the subject's, of the first model's first kind of work at its
    fewest images; the headline says what the rounds show, or that they show nothing."""
    rows = [
        r for r in report["rows"] if r.get("role") == "peer" and {"ratio", "verdict"} <= r.keys()
    ]
    if not rows:
        return None
    key = {name: rows[0][name] for name in ("model", "section", "images")}
    rows = [row for row in rows if all(row[name] == value for name, value in key.items())]
    subject = f"{report['settings']['backend']} {report['settings']['precision']}"
    hardest = min(rows, key=lambda row: row["ratio"]["median"])  # the peer that is hardest to beat
    title = f"No difference to {hardest['contender']} is shown ({hardest['verdict']})"
    if "as quick" in hardest["verdict"]:
        slower = hardest["contender"] if hardest["verdict"].startswith(subject) else subject
        title = f"{hardest['verdict']} as {slower}"
    elif hardest["verdict"] == NO_VERDICT:
        title = f"No verdict on {hardest['contender']}: the machine was busy"
    figure, axes = new_figure(title)
    names = [printable(name) for name in (subject, *(row["contender"] for row in rows))]
    medians = [1.0, *(row["ratio"]["median"] for row in rows)]
    low = [0.0, *(row["ratio"]["median"] - row["ratio"]["p5"] for row in rows)]
    high = [0.0, *(row["ratio"]["p95"] - row["ratio"]["median"] for row in rows)]
    axes.barh(names, medians, xerr=[low, high], capsize=3, color=[colour(i) for i in
              range(len(names))])  # fmt: skip
    for i, median in enumerate(medians):
        axes.annotate(f"{median:.2f}", (0, i), xytext=(6, 0), textcoords="offset points",
                      va="center", color="white", fontweight="bold")  # fmt: skip
    axes.invert_yaxis()
    axes.set_xlabel(f"time ÷ that of {subject} (median, 5–95 % of the rounds)")
    subtitle(axes, report, f"{key['model']} {key['section']}, images: {key['images']}")
    return figure


def latency_figure(report: dict[str, Any]) -> Figure | None:
    """Time of one forward against its multiply-adds: every model, at its fewest images."""
    rows = [row for row in ok_rows(report, "forward") if "gflops" in row]
    if not rows:
        return None
    fewest = min(row["images"] for row in rows)
    rows = [row for row in rows if row["images"] == fewest]
    if len({row["gflops"] for row in rows}) < 2:
        return None
    figure, axes = new_figure("Latency against Gflops")
    unet = [row for row in rows if row["role"] == "other network"]
    names = names_of(row for row in rows if row not in unet)
    for i, name in enumerate(names):
        series = sorted((r for r in rows if r["contender"] == name), key=lambda r: r["gflops"])
        error_bars(axes, [r["gflops"] / 2 for r in series], series, name, i, "ms")
        if i == 0:
            for row in series:
                axes.annotate(row["model"], (row["gflops"] / 2, row["ms"]["median"]),
                              textcoords="offset points", xytext=(6, -12), fontsize=8)  # fmt: skip
    for i, name in enumerate(names_of(unet)):
        # Timed beside every model; one point each, on one vertical line.
        series = [row for row in unet if row["contender"] == name]
        xs = [row["gflops"] / 2 for row in series]
        error_bars(axes, xs, series, name, len(names) + i, "ms", line=False, marker="*")
    log_axes(axes, "xy")
    axes.set_xlabel("multiply-adds of one forward, 10⁹ (the paper's Gflops)")
    axes.set_ylabel("one forward, ms (median, 5–95 %)")
    legend(axes)
    subtitle(axes, report, f"{fewest} image{'s' * (fewest > 1)}")
    return figure


def throughput_figure(report: dict[str, Any]) -> Figure | None:
    """Images a second against the number of images, of a guided step or else of a forward."""
    rows = ok_rows(report, "step") or ok_rows(report, "forward")
    if not rows:
        return None
    if len({row["images"] for row in rows}) < 2:
        return None
    what = {"step": "guided steps", "forward": "forwards"}[rows[0]["section"]]
    figure, axes = new_figure("Throughput against batch")
    many = len({row["model"] for row in rows}) > 1

    def label(row: Row) -> str:
        return f"{row['model']} {row['contender']}" if many else row["contender"]

    for i, name in enumerate(dict.fromkeys(map(label, rows))):
        series = sorted((r for r in rows if label(r) == name), key=lambda r: r["images"])
        error_bars(axes, [r["images"] for r in series], series, name, i, "images_s")
    images = sorted({row["images"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(images, [str(n) for n in images])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("images at once")
    axes.set_ylabel(f"{what} of one image, a second (median, 5–95 %)")
    legend(axes)
    subtitle(axes, report, None if many else rows[0]["model"])
    return figure


def distance_figure(scaling: dict[str, Any]) -> Figure | None:
    """Distance against Gflops: a line for the DiTs of each number of training steps, and a point
    for each other network. ``scaling`` is a report of that kind."""
    rows = [row for row in scaling["rows"] if row["section"] == "scaling"]
    if len(rows) < 2:
        return None
    metric = scaling["settings"].get("metric", "distance")
    figure, axes = new_figure(f"{metric} against Gflops")
    for i, steps in enumerate(sorted({row["steps"] for row in rows})):
        chosen = sorted((r for r in rows if r["steps"] == steps), key=lambda r: r["gmacs"])
        dits = [row for row in chosen if row["case"].startswith("DiT")]
        for series, form in [(dits, "-"), *(([row], "") for row in chosen if row not in dits)]:
            name = "DiT" if form else series[0]["case"]
            axes.plot([r["gmacs"] for r in series], [r["distance"] for r in series],
                      MARKERS[i % len(MARKERS)] + form, color=colour(i), ms=7,
                      mfc=None if form else "none", label=f"{name}, {steps} steps")  # fmt: skip
        for row in dits:
            axes.annotate(row["case"][4:], (row["gmacs"], row["distance"]), fontsize=8,
                          textcoords="offset points", xytext=(6, 4))  # fmt: skip
    log_axes(axes, "x")
    axes.set_xlabel("multiply-adds of one forward, 10⁹ (the paper's Gflops)")
    axes.set_ylabel(f"{metric}, N = {', '.join(str(n) for n in sorted({r['n'] for r in rows}))}")
    axes.margins(x=0.15)
    legend(axes)
    return figure


def roofline_figure(report: dict[str, Any]) -> Figure | None:
    """What was reached beside what the machine can do.

    On the left FLOP/s against FLOPs a byte, of networks and of operators that multiply matrices;
    on the right, where there are any, GB/s against the bytes moved, of operators that do not.
    """
    ceilings = report.get("ceilings")
    networks = [
        row for row in ok_rows(report, "forward") if {"flops_per_byte", "tflop_s"} <= row.keys()
    ]
    operators = _operator_rows(report)
    if ceilings is None or len(networks) + len(operators) < 2:
        return None
    moving = [row for row in operators if row["unit"] == "GB/s"]
    figure, axes = new_figure("Roofline", panels=2 if moving else 1)
    left = axes[0] if moving else axes
    multiplying = [row for row in operators if row["unit"] == "TFLOP/s"]
    points = [(r["flops_per_byte"], r["tflop_s"]) for r in networks]
    points += [(r["flops"] / r["bytes"], r["rate"]) for r in multiplying]
    _roofs(left, ceilings, [x for x, _ in points])
    for i, name in enumerate(names_of(networks)):
        series = [row for row in networks if row["contender"] == name]
        left.plot([r["flops_per_byte"] for r in series], [r["tflop_s"] for r in series],
                  MARKERS[0], ms=8, mfc="none", mew=1.6, color=colour(i),
                  label=f"{name} forward")  # fmt: skip
    _scatter_operators(left, multiplying, lambda r: (r["flops"] / r["bytes"], r["rate"]))
    log_axes(left, "xy")
    left.set_xlabel("FLOPs a byte of least traffic (networks: of the weights)")
    left.set_ylabel("TFLOP/s")
    if moving:
        right = axes[1]
        _scatter_operators(right, moving, lambda r: (r["bytes"] / 2**20, r["rate"]))
        right.axhline(ceilings["copy_gb_s"], color="black", lw=1.2)
        right.annotate("large copy", (0.02, ceilings["copy_gb_s"]), fontsize=8, va="bottom",
                       xycoords=("axes fraction", "data"))  # fmt: skip
        log_axes(right, "xy")
        right.set_xlabel("least traffic, MiB (small ones stay in the caches)")
        right.set_ylabel("GB/s")
        legend(right)
        legend(left, below=True)
    else:
        legend(left)
    subtitle(left, report, None)
    return figure


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
                  ms=5, alpha=0.8, color=colour(i + 3), label=kind)  # fmt: skip


def _operator_rows(report: dict[str, Any]) -> list[Row]:
    """Those of the project's own implementations that were timed."""
    rows = report["rows"]
    return [r for r in rows if r["status"] == "ok" and "rate" in r and r.get("role") != "peer"]
