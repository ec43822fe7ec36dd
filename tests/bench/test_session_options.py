"""The measurement of onnxruntime's session options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_dit

from dit_bench import session_options
from dit_bench.load import warning
from dit_bench.timing import Interleaved


def test_every_variant_is_checked_and_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session_options, "model_of", lambda _: tiny_dit())
    monkeypatch.setattr(session_options, "settle", print)  # would wait for other tests to end
    monkeypatch.setenv("DIT_ENGINE_CACHE", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    path = tmp_path / "options.json"
    try:
        code = session_options.main(["--rounds", "2", "--threads", "1", "--json", str(path)])
    finally:
        torch.set_num_threads(before)
    report = json.loads(path.read_text())
    assert {row["options"] for row in report["rows"]} == set(session_options.variants(1))
    assert all(row["ms"]["n"] == 2 and row["ms"]["median"] > 0 for row in report["rows"])
    medians = [row["ms"]["median"] for row in report["rows"]]
    assert medians == sorted(medians)
    slower = [row for row in report["rows"] if row["ours_over_it"]["p5"] > session_options.MARGIN]
    if warning(report) is not None:  # a busy machine names no winner
        slower = []
    assert code == bool(slower)
    assert ("is better by more than 5 %" in capsys.readouterr().out) == bool(slower)


def test_the_variants_differ_from_the_backends_in_one_thing() -> None:
    made = session_options.variants(3)
    ours = made.pop(session_options.OURS)
    assert ours.intra_op_num_threads == 3
    assert ours.get_session_config_entry("session.force_spinning_stop") == "1"
    assert not made["no arena"].enable_cpu_mem_arena and ours.enable_cpu_mem_arena
    assert not made["no memory pattern"].enable_mem_pattern and ours.enable_mem_pattern
    levels = [o.graph_optimization_level for o in (ours, *made.values())]
    assert len({levels[0], *(made[f"optimisation: {n}"].graph_optimization_level
                             for n in ("basic", "extended"))}) == 3  # fmt: skip
    assert all(o.intra_op_num_threads == 3 for o in made.values())


def test_a_variant_that_computes_something_else_is_not_timed() -> None:
    right, wrong = torch.ones(4), torch.tensor([1, 1, 1, float("nan")])
    session_options.check({session_options.OURS: lambda: right, "same": lambda: right})
    with pytest.raises(RuntimeError, match=r"^other: its result is nan from that of"):
        session_options.check({session_options.OURS: lambda: right, "other": lambda: wrong})


def test_ratios_are_of_ours_over_the_others() -> None:
    times = Interleaved({session_options.OURS: [10.0, 20.0], "other": [5.0, 10.0]})
    first, second = session_options.rows(times)
    assert first["options"] == "other" and first["ours_over_it"]["median"] == 2
    assert second["ours_over_it"]["median"] == 1


@pytest.mark.parametrize("option", ["--batch", "--threads", "--rounds"])
def test_bad_numbers(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert session_options.main([option, "0"]) == 2
    assert capsys.readouterr().err == f"error: {option[2:]} 0 is not positive\n"
