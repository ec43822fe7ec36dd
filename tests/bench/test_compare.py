"""A report beside an older one: a difference within the noise is not called a change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import made_up
import pytest

from dit_bench import cli
from dit_bench.compare import compare_reports, exit_code


def report_of(ms: float, width: float = 0.05, unsure: str = "") -> dict[str, Any]:
    """The made-up report whose first time is another; unsure: "noisy", "busy" or neither."""
    report = made_up.report()
    report["rows"][0] |= {"ms": made_up.spread(ms, width), "noisy": unsure == "noisy"}
    return report | ({"other_load": 0.8} if unsure == "busy" else {})


# The old time is 3.8 … 4 … 4.2 ms (5 %, median, 95 %), and a new one that spreads by 5 % as well
# is slower once 0.95 · new > 4.2, from 4.4211 ms on, and quicker once 1.05 · new < 3.8, below
# 3.6190 ms. With spreads of 0.1 % the bound is 3 % of the median: 4.12 ms and 3.88 ms. Where one
# of them is noisy, a regression is a 5 % quantile above three times 4.2 ms, which is 25.2 ms for a
# spread of 50 %, or a median above ten times 4.2 ms.
@pytest.mark.parametrize(
    ("new_ms", "width", "unsure", "verdict"),
    [
        (4.42, 0.05, "", "no difference shown"), (4.43, 0.05, "", "regression"),
        (3.62, 0.05, "", "no difference shown"), (3.61, 0.05, "", "quicker"),
        (4.11, 0.001, "", "no difference shown"), (4.13, 0.001, "", "regression"),
        (3.89, 0.001, "", "no difference shown"), (3.87, 0.001, "", "quicker"),
        (6.0, 0.05, "noisy", "noisy"), (6.0, 0.05, "busy", "noisy"), (3.0, 0.05, "noisy", "noisy"),
        (25.1, 0.5, "noisy", "noisy"), (25.3, 0.5, "noisy", "regression"),
        (41.9, 0.99, "noisy", "noisy"), (42.1, 0.99, "noisy", "regression"),
    ],
)  # fmt: skip
def test_the_noise_of_both_runs_bounds_a_change(
    new_ms: float, width: float, unsure: str, verdict: str
) -> None:
    old = report_of(4.0, min(width, 0.05))
    found = compare_reports(report_of(new_ms, width, unsure), old)
    row = found["rows"][0]
    assert row["verdict"] == verdict
    assert (row["old_ms"], row["new_ms"], row["ratio"]) == pytest.approx((4, new_ms, new_ms / 4))
    assert exit_code(found) == {"regression": 1, "noisy": 3}.get(verdict, 0)
    assert exit_code(found, strict=True) == int(verdict in ("regression", "noisy"))
    if verdict == "noisy":  # also where the old one is
        found = compare_reports(old, report_of(new_ms, width, unsure))
        assert found["rows"][0]["verdict"] == "noisy"


def test_what_cannot_be_compared_is_told_and_not_judged() -> None:
    old, other, missing, failed = (made_up.report() for _ in range(4))
    other["machine"] |= {"threads": 8, "cpu": "another"}
    del missing["rows"][0]
    failed["rows"][0] |= {"status": "skipped", "reason": "no memory"}
    for new, notes, lost in (
        (other, ["cpu: 'a processor' then, 'another' now", "threads: 2 then, 8 now"], []),
        (missing, [], ["S/8, batch 1, forward, lean bf16: not measured now"]),
        (failed, [], ["S/8, batch 1, forward, lean bf16: skipped now (no memory)"]),
        (old | {"complete": False}, [], []),
    ):
        found = compare_reports(new, old)
        assert (found["notes"], found["lost"]) == (notes, lost)
        assert exit_code(found) == 0 and exit_code(found, strict=True) == 1
        verdicts = {row["verdict"] for row in found["rows"]}
        assert verdicts == {"another machine" if notes else "no difference shown"}


def test_generations_of_other_settings_are_not_compared() -> None:
    old, new = made_up.report(), made_up.report()
    old["rows"] = [made_up.row("S/8", "image", 1, "lean bf16", "subject", 900.0, 50.0)]
    new["rows"] += old["rows"]
    assert len(compare_reports(new, old)["rows"]) == 1
    old["settings"]["steps"] = 50
    with pytest.raises(ValueError, match="no measurement in common"):
        compare_reports(new, old)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = made_up.report()
    other["rows"] = [made_up.row("another", "forward", 1, "lean bf16", "subject", 1.0, 1.0)]
    paths = [tmp_path / name for name in ("old", "new", "other")]
    for path, report in zip(paths, (report_of(4.0), report_of(6.0), other), strict=True):
        path.write_text(json.dumps(report), encoding="utf-8")
    old, new, no = map(str, paths)
    for arguments in (["compare", old, new], ["--load", new, "--compare", old]):
        assert cli.main(arguments) == 1
        assert "regression" in capsys.readouterr().out
    assert cli.main(["compare", new, old, "--strict"]) == 0
    csv = tmp_path / "new.csv"
    assert cli.main(["--load", new, "--compare", no, "--csv", str(csv)]) == 2
    assert "other: the two reports have no measurement in common" in capsys.readouterr().err
    assert csv.exists()  # what was measured is written all the same
