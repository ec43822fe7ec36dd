"""The roofline: what networks and operators reached beside what the machine can do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from dit_bench.show.drawing import (
    MARKERS,
    Row,
    colour,
    legend,
    log_axes,
    names_of,
    new_figure,
    ok_rows,
    subtitle,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def roofline_figure(report: dict[str, Any]) -> Figure | None:
    """What was reached beside what the machine can do.

    On the left FLOP/s against FLOPs a byte, of networks and of operators that multiply matrices;
    on the right, where there are any, GB/s against the bytes moved, of operators that do not.
    """
    ceilings = report["ceilings"]
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
        series = [row for row in networks if row["name"] == name]
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
    rows = report.get("operators", {}).get("operators", [])
    return [r for r in rows if r.get("status") == "ok" and "rate" in r and not r.get("opponent")]
