"""Figures show names literally, and logs with many columns are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dit_engine.training.log import drop_rows_after, plot_losses

pytest.importorskip("matplotlib", reason="no matplotlib")

NAMES = ["x$\\frac$", "$$ \x1b[31m\n</svg><script>"]


def report(name: str) -> dict[str, Any]:
    """A report in which the subject, its peer, a model and the CPU have this name."""
    ms = {"median": 2.0, "p5": 1.9, "p95": 2.1}
    rows = [
        {"what": what, "images": images, "status": "ok", "noisy": False, "model": name,
         "role": role, "name": f"{name} {role}", "ms": ms, "gflops": gflops, "images_s": 500.0,
         "ratio": {"median": 1.0, "p5": 0.9, "p95": 1.1}, "verdict": f"{name} twice as quick"}
        for what in ("forward", "step") for role in ("subject", "peer")
        for images, gflops in ((1, 2.0), (1, 4.0), (2, 4.0))
    ]  # fmt: skip
    return {
        "settings": {"backend": name, "precision": "fp32", "device": "cpu", "threads": 1},
        "environment": {"hardware": {"cpu": name}},
        "measurements": rows,
    }


@pytest.mark.parametrize("name", NAMES)
def test_names_are_not_formulas(name: str) -> None:
    from matplotlib.text import Text

    from dit_bench.show.drawing import svg
    from dit_bench.show.plots import latency_figure, ratio_figure, throughput_figure

    for make in (ratio_figure, latency_figure, throughput_figure):
        figure = make(report(name))
        assert figure is not None, make
        drawn = svg(figure).decode()
        ElementTree.fromstring(drawn)
        shown = [t for t in figure.findobj(Text) if isinstance(t, Text) and "$" in t.get_text()]
        assert all(not text.get_parse_math() for text in shown)
        assert shown or "$" not in name


def test_numbers_at_logarithmic_axes_stay_formulas(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from dit_engine.io.printable import show_plainly

    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], [1e-3, 1e6], label="$")
    axes.set(yscale="log", title="$a$ \\frac$")
    show_plainly(figure).savefig(tmp_path / "a.png")
    labels = axes.get_yticklabels()
    assert labels and all(label.get_parse_math() for label in labels)
    assert axes.title.get_text() == "$a$ \\frac$" and not axes.title.get_parse_math()


def test_a_log_is_a_table_of_few_numbers(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("step,loss,$\\frac$\n10,1,2\n20,x,3\n30,1\n40,2,1\n5e1,2,2\n60,1,1\nnan,1,1\n")
    drop_rows_after(log, 50)
    assert log.read_text() == "step,loss,$\\frac$\n10,1,2\n40,2,1\n5e1,2,2\n"
    plot_losses(log, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    for text in ("step" + ",a" * 100_000, "other,loss"):
        log.write_text(f"{text}\n1{',1' * 100_000}\n")
        with pytest.raises(ValueError, match=r"log.csv is not a log of a training: remove it"):
            drop_rows_after(log, 50)
