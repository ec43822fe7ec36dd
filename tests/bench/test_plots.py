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
from dit_bench.show.drawing import png, save_figures
from dit_bench.show.plots import (
    CAPTIONS,
    all_figures,
    distance_figure,
    latency_figure,
    roofline_figure,
    throughput_figure,
)

pytest.importorskip("matplotlib", reason="no matplotlib")


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    report = made_up.report()
    report["rows"] += made_up.operators()["rows"]
    return report


def lines_of(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Label → x and y of every series, also of those with error bars."""
    found = {}
    for container in axes.containers:
        line = container.lines[0]
        found[container.get_label()] = (list(line.get_xdata()), list(line.get_ydata()))
    for line in axes.lines:
        if not line.get_label().startswith("_"):
            found[line.get_label()] = (list(line.get_xdata()), list(line.get_ydata()))
    return found


def test_latency_is_that_of_one_image_against_multiply_adds(report: dict[str, Any]) -> None:
    figure = latency_figure(report)
    assert figure is not None
    lines = lines_of(figure.axes[0])
    assert lines.keys() == {"lean bf16", "eager bf16", "LDM-4 U-Net bf16"}  # not what was skipped
    xs, ys = lines["lean bf16"]
    assert xs == pytest.approx([0.36, 1.41], rel=0.02) and ys == [4.0, 10.0]
    assert lines["eager bf16"][1] == [8.0, 20.0]
    xs, ys = lines["LDM-4 U-Net bf16"]
    assert xs == pytest.approx([104.225] * 2) and ys == [300.0] * 2
    assert {text.get_text() for text in figure.axes[0].texts} >= {"S/8", "S/4"}
    assert "log" in (figure.axes[0].get_xscale(), figure.axes[0].get_yscale())


def test_throughput_is_that_of_steps_against_images(report: dict[str, Any]) -> None:
    figure = throughput_figure(report)
    assert figure is not None
    lines = lines_of(figure.axes[0])
    assert set(lines) == {f"{m} {n}" for m in made_up.MODELS for n in ("lean bf16", "eager bf16")}
    xs, ys = lines["S/8 lean bf16"]
    assert xs == [1, 2, 4] and ys == pytest.approx([1e3 * n**0.5 / 8 for n in (1, 2, 4)])


def test_the_roofline_holds_every_operator_and_the_roofs(report: dict[str, Any]) -> None:
    figure = roofline_figure(report)
    assert figure is not None
    left, right = figure.axes
    lines = lines_of(left)
    assert lines["linear"] == ([250.0], [0.5])  # 5e8 FLOPs over 2e6 bytes
    assert "lean bf16 forward" in lines and "layernorm_modulate" not in lines
    assert lines_of(right)["layernorm_modulate"] == ([8e6 / 2**20], [8.0])  # the opponent is not
    roofs = [line for line in left.lines if line.get_label().startswith("_")]
    tops = sorted(float(line.get_ydata()[-1]) for line in roofs)
    assert tops == [0.1, 1.0]
    sloped = max(roofs, key=lambda line: line.get_ydata()[-1])
    x, y = sloped.get_xdata(), sloped.get_ydata()
    assert y[0] / x[0] == pytest.approx(0.01)  # 10 GB/s: 0.01 TFLOP/s at one FLOP a byte
    assert x[1] == pytest.approx(100)


def test_without_operators_one_panel_is_left() -> None:
    figure = roofline_figure(made_up.report())
    assert figure is not None and len(figure.axes) == 1


def test_distance_has_a_series_for_each_length_of_training() -> None:
    figure = distance_figure(made_up.scaling())
    assert figure is not None
    lines = lines_of(figure.axes[0])
    assert lines["DiT, 3000 steps"] == ([0.5, 2.0], [170.0, 20.0])
    assert lines["U-Net, 3000 steps"] == ([4.0], [-5.0])
    assert "N = 2400" in figure.axes[0].get_ylabel()


def test_each_opens_and_is_not_blank(report: dict[str, Any], tmp_path: Path) -> None:
    figures = all_figures(report, made_up.scaling())
    names = ["latency-gflops", "throughput-images", "roofline", "distance-gflops"]
    assert list(figures) == names
    for path in save_figures(figures, tmp_path / "plots"):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        assert min(pixels.shape[:2]) > 400
        dark = (pixels.sum(axis=2) < 200).mean()
        coloured = (pixels.max(axis=2) - pixels.min(axis=2) > 60).mean()
        assert dark > 0.002 and coloured > 0.0005, path.name


def test_no_data_makes_no_figure(report: dict[str, Any]) -> None:
    empty = report | {"rows": []}
    assert all_figures(empty, None) == {}
    with Image.open(io.BytesIO(png(latency_figure(report)))) as image:
        assert image.format == "PNG"


def test_the_ratio_is_the_headline_and_stands_first() -> None:
    report = made_up.report()
    for row in report["rows"]:
        if row["role"] == "peer" and row["status"] == "ok":
            row |= {"ratio": made_up.ratio(2.0), "verdict": "lean bf16 is 2.00× as quick"}
    figures = all_figures(report, None)
    assert next(iter(figures)) == "ratio" and figures.keys() <= CAPTIONS.keys()
    assert figures["ratio"].get_suptitle() == "lean bf16 is 2.00× as quick as eager bf16"
    bars = figures["ratio"].axes[0].patches
    assert [bar.get_width() for bar in bars] == [1.0, 2.0]
    withdraw_verdicts(report | {"other_load": 0.9})
    title = all_figures(report, None)["ratio"].get_suptitle()
    assert title == "No verdict on eager bf16: the machine was busy"
    assert all(text[0].isupper() and text.endswith(".") for text in CAPTIONS.values())


def test_a_single_point_is_no_figure() -> None:
    report = made_up.report()
    report["rows"] = report["rows"][:1]
    one = made_up.scaling()
    one["rows"] = one["rows"][:1]
    assert all_figures(report, one) == {}
