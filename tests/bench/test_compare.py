"""A report beside an older one: a difference within the noise is not called a change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import made_up
import pytest

from dit_bench import cli
from dit_bench.compare import compare_reports, exit_code


def slower(factor: float, width: float = 0.05) -> dict[str, Any]:
    """The made-up report, whose first time (4 ms) is multiplied."""
    report = made_up.report()
    row = report["rows"][0]
    row["ms"] = made_up.spread(row["ms"]["median"] * factor, width)
    return report


def verdicts(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    return [row["verdict"] for row in compare_reports(new, old)["rows"]]


def noisy(report: dict[str, Any], width: float = 0.5) -> dict[str, Any]:
    """``report`` with its first time spread so far that it is noise."""
    row = report["rows"][0]
    row |= {"noisy": True, "ms": made_up.spread(row["ms"]["median"], width)}
    return report


def busy(report: dict[str, Any]) -> dict[str, Any]:
    return report | {"other_load": 0.8}


# The old time is 3.8 … 4 … 4.2 ms (5 %, median, 95 %), and the new one spreads by 5 % as well: it
# is slower once 0.95 · new > 4.2, from 4.4211 ms on, and quicker once 1.05 · new < 3.8, below
# 3.6190 ms. With spreads of 0.1 % the bound is 3 % of the median: 4.12 ms and 3.88 ms.
@pytest.mark.parametrize(
    ("new_ms", "width", "verdict"),
    [
        (4.0, 0.05, "no difference shown"),
        (4.42, 0.05, "no difference shown"), (4.43, 0.05, "regression"),
        (3.62, 0.05, "no difference shown"), (3.61, 0.05, "quicker"),
        (4.11, 0.001, "no difference shown"), (4.13, 0.001, "regression"),
        (3.89, 0.001, "no difference shown"), (3.87, 0.001, "quicker"),
    ],
)  # fmt: skip
def test_the_noise_of_both_runs_bounds_a_change(new_ms: float, width: float, verdict: str) -> None:
    found = compare_reports(slower(new_ms / 4.0, width), slower(1.0, width))
    row = found["rows"][0]
    assert row["verdict"] == verdict
    assert (row["old_ms"], row["new_ms"], row["ratio"]) == pytest.approx((4, new_ms, new_ms / 4))
    assert {each["verdict"] for each in found["rows"][1:]} == {"no difference shown"}
    assert exit_code(found) == exit_code(found, strict=True) == int(verdict == "regression")


@pytest.mark.parametrize("unsure", [noisy, busy], ids=["noisy", "busy"])
def test_noise_of_either_run_counts(unsure: Any) -> None:
    """One and a half times as slow is a regression between quiet runs, and unknown where the old
    one, the new one or both are noisy."""
    assert verdicts(slower(1.5), slower(1.0))[0] == "regression"
    pairs = [(unsure(slower(1.5)), slower(1.0)), (slower(1.5), unsure(slower(1.0))),
             (unsure(slower(1.5)), unsure(slower(1.0)))]  # fmt: skip
    for new, old in pairs:
        found = compare_reports(new, old)
        assert found["rows"][0]["verdict"] == "noisy"
        assert exit_code(found) == 3 and exit_code(found, strict=True) == 1
        assert verdicts(old, new)[0] == "noisy"  # nor is anything quicker


# A noisy new time is 2 … 4·f … 6·f ms for a factor f; the old one is 3.8 … 4.2 ms. Beyond all
# noise is a 5 % quantile of three times 4.2 ms, f > 6.3, or a median of ten times, f > 10.5.
@pytest.mark.parametrize(
    ("factor", "width", "verdict"),
    [(6.2, 0.5, "noisy"), (6.4, 0.5, "regression"), (10.4, 0.99, "noisy"),
     (10.6, 0.99, "regression")],
)  # fmt: skip
def test_what_is_far_beyond_all_noise_is_a_regression(
    factor: float, width: float, verdict: str
) -> None:
    found = compare_reports(noisy(slower(factor), width), slower(1.0))
    assert found["rows"][0]["verdict"] == verdict
    assert exit_code(found) == {"noisy": 3, "regression": 1}[verdict]


def test_the_exit_code_of_a_comparison() -> None:
    quiet, other = made_up.report(), made_up.report()
    assert exit_code(compare_reports(quiet, quiet), strict=True) == 0
    other["machine"] = other["machine"] | {"threads": 8, "cpu": "another"}
    found = compare_reports(slower(2.0), other)
    assert {row["verdict"] for row in found["rows"]} == {"another machine"}
    assert found["notes"] == ["cpu: 'another' then, 'a processor' now", "threads: 8 then, 2 now"]
    assert exit_code(found) == 0 and exit_code(found, strict=True) == 1


@pytest.mark.parametrize("first", [0, 1], ids=["subject", "peer"])
def test_what_is_lost_is_told_and_not_judged(first: int) -> None:
    old, missing, failed = made_up.report(), made_up.report(), made_up.report()
    del missing["rows"][first]
    failed["rows"][first] |= {"status": "skipped", "reason": "no memory"}
    for new in (missing, failed):
        found = compare_reports(new, old)
        assert len(found["lost"]) == 1 and found["lost"][0].startswith("S/8, batch 1, forward, ")
        assert exit_code(found) == 0 and exit_code(found, strict=True) == 1
    found = compare_reports(old | {"complete": False}, old)
    assert exit_code(found) == 0 and exit_code(found, strict=True) == 1
    for report in (old, failed):
        report["rows"] = report["rows"][first : first + 1]
    assert compare_reports(failed, old)["rows"] == []  # lost, although nothing is compared


def test_generations_of_other_settings_are_not_compared() -> None:
    old, new = made_up.report(), made_up.report()
    for report in (old, new):
        report["rows"].append(made_up.row("S/8", "image", 1, "lean bf16", "subject", 900.0, 50.0))
    assert verdicts(new, old)[-1] == "no difference shown"
    before = len(verdicts(new, old))
    old["settings"]["steps"] = 50
    assert len(verdicts(new, old)) == before - 1


def test_the_command_and_reports_without_a_common_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = made_up.report()
    other["rows"] = [made_up.row("another", "forward", 1, "lean bf16", "subject", 1.0, 1.0)]
    paths = [tmp_path / name for name in ("old", "new", "other")]
    for path, report in zip(paths, (slower(1.0), slower(1.5), other), strict=True):
        path.write_text(json.dumps(report), encoding="utf-8")
    old, new, no = map(str, paths)
    assert cli.main(["compare", old, new]) == 1
    assert "regression" in capsys.readouterr().out
    assert cli.main(["compare", new, old, "--strict"]) == 0
    assert cli.main(["--load", new, "--compare", old]) == 1
    assert "regression" in capsys.readouterr().out
    assert cli.main(["compare", no, new]) == 2
    assert "no measurement in common" in capsys.readouterr().err
    options = ["--compare", no, "--csv", str(tmp_path / "new.csv")]
    assert cli.main(["--load", new, *options]) == 2
    assert "other: the two reports have no measurement in common" in capsys.readouterr().err
    assert (tmp_path / "new.csv").exists()
