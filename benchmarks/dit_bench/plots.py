"""Figures of a report: each function gives one, or None where there is no data for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_bench.drawing import (
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
from dit_bench.roofline import roofline_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    rows = ok_rows(report, "forward")
    if not rows:
        return None
    fewest = min(row["images"] for row in rows)
    rows = [row for row in rows if row["images"] == fewest]
    figure, axes = new_figure("Latency against Gflops")
    unet = [row for row in rows if row["role"] == "other network"]
    names = names_of(row for row in rows if row not in unet)
    for i, name in enumerate(names):
        series = sorted((r for r in rows if r["name"] == name), key=lambda r: r["gflops"])
        error_bars(axes, [r["gflops"] / 2 for r in series], series, name, i, "ms")
        if i == 0:
            for row in series:
                axes.annotate(row["model"], (row["gflops"] / 2, row["ms"]["median"]),
                              textcoords="offset points", xytext=(6, -12), fontsize=8)  # fmt: skip
    for i, name in enumerate(names_of(unet)):
        # Timed beside every model; one point each, on one vertical line.
        series = [row for row in unet if row["name"] == name]
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
    what = {"step": "guided steps", "forward": "forwards"}[rows[0]["what"]]
    figure, axes = new_figure("Throughput against batch")
    many = len({row["model"] for row in rows}) > 1

    def label(row: Row) -> str:
        return f"{row['model']} {row['name']}" if many else row["name"]

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
    """Distance against Gflops, one line a number of training steps (`read_scaling`)."""
    points = scaling["points"]
    if not points:
        return None
    figure, axes = new_figure(f"{scaling['metric']} against Gflops")
    for i, steps in enumerate(sorted({point["steps"] for point in points})):
        chosen = sorted((p for p in points if p["steps"] == steps), key=lambda p: p["gmacs"])
        axes.plot([p["gmacs"] for p in chosen], [p["distance"] for p in chosen],
                  MARKERS[i % len(MARKERS)], color=colour(i), ms=7,
                  label=f"{steps} training steps")  # fmt: skip
        for p in chosen:
            axes.annotate(p["network"], (p["gmacs"], p["distance"]), fontsize=8,
                          textcoords="offset points", xytext=(6, 4))  # fmt: skip
    counts = sorted({point["n"] for point in points})
    log_axes(axes, "x")
    axes.set_xlabel("multiply-adds of one forward, 10⁹ (the paper's Gflops)")
    axes.set_ylabel(f"{scaling['metric']}, N = {', '.join(map(str, counts))}")
    axes.margins(x=0.15)
    legend(axes)
    return figure
