"""Figures of a report. Each function makes one, or None if there is no data for it.

pyplot is not used, so figures can be made by any thread and on any machine.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dit_bench.report import Report, Row
from dit_engine.io.printable import printable, show_plainly

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vP<>*X"
_GFLOPS = "multiply-adds of one forward per image, 10⁹ (the paper's Gflops)"


def require_matplotlib() -> None:
    try:
        import matplotlib as _  # noqa: F401
    except ImportError:
        raise ImportError("matplotlib is not installed: pip install 'dit-engine[bench]'") from None


def drawn(figure: Figure, form: str) -> bytes:
    """The figure as "png" or "svg"."""
    out = io.BytesIO()
    show_plainly(figure).savefig(out, format=form)
    return out.getvalue()


def all_figures(report: Report) -> dict[str, Figure]:
    """File stem → figure, for all figures that have data; the first is the main one of a run."""
    made = {
        "ratio": ratio_figure(report),
        "latency-gflops": latency_figure(report),
        "roofline": roofline_figure(report),
        "distance-gflops": distance_figure(report),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def ratio_figure(report: Report) -> Figure | None:
    """Bars of every peer's time over the subject's, for the first model's first kind of work with
    the fewest images. The headline is the verdict on the quickest peer."""
    rows = [row for row in report["rows"]
            if row.get("role") == "peer" and {"ratio", "verdict"} <= row.keys()]  # fmt: skip
    if not rows:
        return None
    key = {name: rows[0][name] for name in ("model", "section", "images")}
    rows = [row for row in rows if key.items() <= row.items()]
    subject = next((row["contender"] for row in report["rows"] if row.get("role") == "subject"
                    and key.items() <= row.items()), "the subject")  # fmt: skip
    hardest = min(rows, key=lambda row: row["ratio"]["median"])
    figure, axes = _figure(
        f"Beside {hardest['contender']}: {hardest['verdict']}", report,
        f"{key['model']} {key['section']}, images: {key['images']}",
    )  # fmt: skip
    names = [printable(name) for name in (subject, *(row["contender"] for row in rows))]
    ratios = [{"p5": 1.0, "median": 1.0, "p95": 1.0}, *(row["ratio"] for row in rows)]
    medians, bars = _bars(ratios)
    axes.barh(names, medians, xerr=bars, capsize=3, color=[f"C{i}" for i in range(len(names))])
    for i, median in enumerate(medians):
        axes.annotate(f"{median:.2f}", (0, i), xytext=(6, 0), textcoords="offset points",
                      va="center", color="white", fontweight="bold")  # fmt: skip
    axes.invert_yaxis()
    axes.set_xlabel(f"time ÷ that of {subject} (median, 5–95 % of the rounds)")
    return figure


def latency_figure(report: Report) -> Figure | None:
    """Time of one forward against its multiply-adds, for every model with the fewest images.
    Another network is one point, although it is timed beside every model."""
    rows = [row for row in _forwards(report) if "gflops" in row]
    fewest = min((row["images"] for row in rows), default=0)
    rows = sorted((r for r in rows if r["images"] == fewest), key=lambda row: row["gflops"])
    if len({row["gflops"] for row in rows}) < 2:
        return None
    figure, axes = _figure("Latency against Gflops", report, f"images: {fewest}")
    ordered = sorted(rows, key=lambda row: row["role"] == "other network")
    names = list(dict.fromkeys(row["contender"] for row in ordered))
    for i, name in enumerate(names):
        series = [row for row in rows if row["contender"] == name]
        other = series[0]["role"] == "other network"
        medians, bars = _bars([row["ms"] for row in series])
        axes.errorbar(
            [row["gflops"] / 2 / fewest for row in series], medians, bars, color=f"C{i}", capsize=3,
            fmt="*" if other else _marker(i), ls="none" if other else "-", lw=1.4,
            ms=11 if other else 6,
            label=f"{name} (noisy)" if any(row["noisy"] for row in series) else name,
        )  # fmt: skip
        for row in series if i == 0 else ():
            axes.annotate(row["model"], (row["gflops"] / 2 / fewest, row["ms"]["median"]),
                          textcoords="offset points", xytext=(6, -12), fontsize=8)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel=_GFLOPS,
             ylabel="one forward, ms (median, 5–95 %)")  # fmt: skip
    _legend(axes)
    return figure


def distance_figure(report: Report) -> Figure | None:
    """Distance against Gflops in the study of scaling: one line of DiTs for each number of training
    steps, and one point for each other network."""
    rows = [r for r in report["rows"] if r["section"] == "scaling" and r["status"] == "ok"]
    if len(rows) < 2:
        return None
    metric = report["settings"].get("metric", "distance")
    figure, axes = _figure(f"{metric} against Gflops", report)
    for i, steps in enumerate(sorted({row["steps"] for row in rows})):
        chosen = sorted((r for r in rows if r["steps"] == steps), key=lambda r: r["gmacs"])
        dits = [row for row in chosen if row["case"].startswith("DiT")]
        for series, form in [(dits, "-"), *(([row], "") for row in chosen if row not in dits)]:
            name = "DiT" if form else series[0]["case"]
            axes.plot([r["gmacs"] for r in series], [r["distance"] for r in series],
                      _marker(i) + form, color=f"C{i}", ms=7, mfc=None if form else "none",
                      label=f"{name}, {steps} steps")  # fmt: skip
        for row in dits:
            axes.annotate(row["case"][4:], (row["gmacs"], row["distance"]), fontsize=8,
                          textcoords="offset points", xytext=(6, 4))  # fmt: skip
    counts = ", ".join(str(n) for n in sorted({row["n"] for row in rows}))
    axes.set(xscale="log", xlabel=_GFLOPS, ylabel=f"{metric}, N = {counts}")
    axes.margins(x=0.15)
    _legend(axes)
    return figure


def roofline_figure(report: Report) -> Figure | None:
    """The reached FLOP/s against FLOPs per byte, for networks and for operators that multiply
    matrices, below the machine's ceilings."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in _forwards(report):
        if {"flops_per_byte", "tflop_s"} <= row.keys():
            name = f"{row['contender']} forward"
            points.setdefault(name, []).append((row["flops_per_byte"], row["tflop_s"]))
    for row in report["rows"]:
        own = row["status"] == "ok" and row.get("role") != "peer"
        if own and row.get("unit") == "TFLOP/s" and {"rate", "flops", "bytes"} <= row.keys():
            place = (row["flops"] / row["bytes"], row["rate"])
            points.setdefault(row["operator"], []).append(place)
    ceilings, every = report.get("ceilings"), [point for each in points.values() for point in each]
    if ceilings is None or len(every) < 2:
        return None
    figure, axes = _figure("Roofline", report)
    _roofs(axes, ceilings, [x for x, _ in every])
    for i, (name, places) in enumerate(points.items()):
        axes.plot(*zip(*places, strict=True), _marker(i), ms=6, color=f"C{i}", label=name)
    axes.set(xscale="log", yscale="log", ylabel="TFLOP/s",
             xlabel="FLOPs per byte of least traffic (networks: of the weights)")  # fmt: skip
    _legend(axes)
    return figure


def _roofs(axes: Axes, ceilings: dict[str, Any], xs: Iterable[float]) -> None:
    """Draw the slope of the copy's rate, and a flat roof for every dtype."""
    slope = ceilings["copy_gb_s"] / 1e3  # TFLOP/s at one FLOP per byte
    rates = sorted(ceilings["matmul_tflop_s"].items(), key=lambda item: -item[1])
    corners = [rate / slope for _, rate in rates] or [1.0]
    low, high = min([*xs, *corners]) / 4, max([*xs, *corners]) * 4
    for i, ((kind, rate), corner) in enumerate(zip(rates, corners, strict=False)):
        start = low if i == 0 else corner
        axes.plot([start, corner, high], [start * slope, rate, rate], color="black", lw=1.2,
                  ls="-" if i == 0 else "--")  # fmt: skip
        axes.annotate(f"{kind} matrix product", (high, rate), fontsize=8, ha="right", va="bottom")
    axes.annotate("copy", (low, low * slope), fontsize=8, textcoords="offset points",
                  xytext=(6, 2))  # fmt: skip


def _figure(title: str, report: Report, more: str = "") -> tuple[Figure, Axes]:
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 5.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.grid(True, which="major", color="#dddddd", lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    machine = report["machine"]
    where = machine.get("gpu") if machine["device"].startswith("cuda") else machine["cpu"]
    parts = (where, f"threads: {machine['threads']}", more)
    axes.set_title(", ".join(part for part in parts if part), fontsize=9, loc="left")
    return figure, axes


def _bars(spreads: list[dict[str, float]]) -> tuple[list[float], list[list[float]]]:
    """The medians, and the lengths of the bars from there to the 5 % and 95 % quantiles."""
    medians = [each["median"] for each in spreads]
    low = [max(0.0, each["median"] - each.get("p5", each["median"])) for each in spreads]
    high = [max(0.0, each.get("p95", each["median"]) - each["median"]) for each in spreads]
    return medians, [low, high]


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))


def _forwards(report: Report) -> list[Row]:
    return [r for r in report["rows"] if r["section"] == "forward" and r["status"] == "ok"]


def _marker(i: int) -> str:
    return _MARKERS[i % len(_MARKERS)]
