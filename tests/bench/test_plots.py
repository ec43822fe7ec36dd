"""Every figure holds the figures of its report, and opens as a picture that is not blank."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import made_up
import numpy as np
import pytest
from PIL import Image

from dit_bench.load import withdraw_verdicts
from dit_bench.report import read
from dit_bench.show.page import page
from dit_bench.show.plots import all_figures, drawn

pytest.importorskip("matplotlib", reason="no matplotlib")


def series_of(figure: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Label → x and y of every series, also of those with error bars."""
    (axes,) = figure.axes
    lines = [(line.get_label(), line) for line in axes.lines]
    lines += [(bars.get_label(), bars.lines[0]) for bars in axes.containers]
    return {
        label: (list(line.get_xdata()), list(line.get_ydata()))
        for label, line in lines
        if not label.startswith("_")
    }


def test_the_figures_hold_what_the_report_does() -> None:
    report = made_up.report()
    report["rows"] += made_up.operators()["rows"]
    for row in report["rows"]:
        if row.get("role") == "peer" and row["section"] != "operator" and row["status"] == "ok":
            row |= {"ratio": made_up.ratio(2.0), "verdict": "lean bf16 is 2.00× as quick"}
    report["rows"] += made_up.scaling()["rows"]
    figures = all_figures(report)
    assert list(figures) == ["ratio", "latency-gflops", "roofline", "distance-gflops"]

    assert figures["ratio"].get_suptitle() == "Beside eager bf16: lean bf16 is 2.00× as quick"
    assert [bar.get_width() for bar in figures["ratio"].axes[0].patches] == [1.0, 2.0]

    series = series_of(figures["latency-gflops"])
    assert series.keys() == {"lean bf16", "eager bf16", "LDM-4 U-Net bf16"}  # not what was skipped
    xs, ys = series["lean bf16"]
    assert xs == pytest.approx([0.36, 1.41], rel=0.02) and ys == [4.0, 10.0]  # of one image
    assert series["LDM-4 U-Net bf16"][0] == pytest.approx([104.225] * 2)
    assert {text.get_text() for text in figures["latency-gflops"].axes[0].texts} >= {"S/8", "S/4"}

    series = series_of(figures["roofline"])
    assert series["linear"] == ([250.0], [0.5])  # 5e8 FLOPs over 2e6 bytes
    assert "lean bf16 forward" in series and "layernorm_modulate" not in series
    roofs = [line for line in figures["roofline"].axes[0].lines if line.get_label()[0] == "_"]
    sloped = max(roofs, key=lambda line: line.get_ydata()[-1])
    x, y = sloped.get_xdata(), sloped.get_ydata()
    assert y[0] / x[0] == pytest.approx(0.01)  # 10 GB/s: 0.01 TFLOP/s at one FLOP per byte
    assert (x[1], y[1]) == pytest.approx((100, 1.0)) and len(roofs) == 2

    series = series_of(figures["distance-gflops"])
    assert series["DiT, 3000 steps"] == ([0.5, 2.0], [170.0, 20.0])
    assert series["U-Net, 3000 steps"] == ([4.0], [-5.0])

    for name, figure in figures.items():
        with Image.open(io.BytesIO(drawn(figure, "png"))) as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        assert min(pixels.shape[:2]) > 400
        dark = (pixels.sum(axis=2) < 200).mean()
        coloured = (pixels.max(axis=2) - pixels.min(axis=2) > 60).mean()
        assert dark > 0.002 and coloured > 0.0005, name

    withdraw_verdicts(report | {"other_load": 0.9})
    assert "busy: no verdict" in all_figures(report)["ratio"].get_suptitle()


@pytest.mark.parametrize("made", [made_up.report, made_up.scaling])
def test_a_single_point_is_no_figure(made: Any) -> None:
    report = made()
    report["rows"] = report["rows"][:1]
    assert all_figures(report) == {}


RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))


def test_every_published_report_has_its_figures_and_its_page() -> None:
    """Those of ``dit-bench cpu`` too, whose settings name no backend."""
    drawn = {path.stem: set(all_figures(read(path))) for path in RESULTS}
    assert drawn["cpu-amd-epyc"] >= {"ratio"} and drawn["scaling"] == {"distance-gflops"}
    latency = series_of(
        all_figures(read(RESULTS[0].with_name("cpu-amd-epyc.json")))["latency-gflops"]
    )
    assert max(latency["lean bf16"][0]) == pytest.approx(118.6, rel=1e-3)  # of two images, for one
    for path in RESULTS:
        title = page(read(path), {}).split("<h1>")[1].split("</h1>")[0]
        assert title.startswith("DiT") and not title.strip().endswith(":")
