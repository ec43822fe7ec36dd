"""A GPU benchmark that ends in time, and keeps what it had measured until then."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gpu_runs import CPU, measured

from dit_bench import gpu, gpu_models, gpu_vae, operators
from dit_bench.budget import Budget
from dit_bench.ceilings import Ceilings
from dit_bench.gpu import Plan, run
from dit_bench.gpu_contenders import EAGER
from dit_bench.gpu_report import Report


def test_without_time_everything_is_skipped_and_said_so(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text("earlier")
    code, values = measured(plan, tmp_path / "gpu.json", seconds=0.0)
    assert json.loads((tmp_path / "gpu.json").read_text()) == values
    assert [p.name for p in tmp_path.iterdir()] == ["gpu.json"]
    assert code == 0 and values["complete"] is True
    assert {r["status"] for r in values["sections"]} == {"skipped"}
    assert {r["reason"] for r in values["sections"]} == {"time budget"}


def test_a_section_that_runs_out_of_time_names_what_it_left(plan: Plan, tmp_path: Path) -> None:
    report = Report(tmp_path / "gpu.json")
    ceilings = Ceilings(1.0, {}, 1, 1)
    operators.OperatorBenchmark(report, CPU, Budget(0), ceilings).run(plan.cases)
    work = gpu_models.Work("tiny", plan.configs["tiny"], (1,), (1,))
    gpu_models.ModelBenchmark(report, CPU, Budget(0), ceilings, (EAGER,)).run([work])
    assert [r["operator"] for r in report.values["operators"]] == [c.operator for c in plan.cases]
    for row in (*report.values["operators"], *report.values["forwards"]):
        assert row["status"] == "skipped" and row["reason"]


def test_what_was_measured_survives_a_kill_beside_an_earlier_result(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_vae.DecodeBenchmark, "run", killed)
    path = tmp_path / "gpu.json"
    path.write_text("earlier")
    with pytest.raises(KeyboardInterrupt):
        run(plan, Report(path), Budget(300))
    values = json.loads((tmp_path / "gpu.json.partial").read_text())
    assert values["complete"] is False and len(values["operators"]) == len(plan.cases)
    assert values["ceilings"]["copy_gb_s"] > 0
    assert path.read_text() == "earlier"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu.json", "gpu.json.partial"]


def test_what_is_worth_most_comes_first(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time ends with the first operator: the first model with 64 and with 2 rows is there."""
    now = [0.0]

    def slow(self: operators.OperatorBenchmark, case: object) -> list[Any]:
        now[0] = 1e6
        return []

    monkeypatch.setattr(operators.OperatorBenchmark, "_rows", slow)
    configs = {"first": plan.configs["tiny"], "second": plan.configs["tiny"]}
    plan = replace(plan, configs=configs, batches=(1, 2, 64), images=(1, 32, 2))
    report = Report(tmp_path / "gpu.json")
    assert run(plan, report, Budget(300, lambda: now[0])) == 0
    values = report.values
    assert [(r["model"], r["batch"]) for r in values["forwards"]] == [("first", 64), ("first", 2)]
    assert [(r["model"], r["batch"]) for r in values["generate"]] == [("first", 32), ("first", 1)]
    assert all(r["status"] == "ok" for r in (*values["forwards"], *values["generate"]))
    late = {r["section"] for r in values["sections"] if r["status"] == "skipped"}
    assert late == {
        "decode", "models", "late", "ragged operators", "other packages' attention"
    }  # fmt: skip


@pytest.mark.slow
def test_the_timer_ends_a_process_that_hangs(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    script = (
        "import sys, time; from pathlib import Path\n"
        "from dit_bench.gpu import stop_late; from dit_bench.gpu_report import Report\n"
        "stop_late(Report(Path(sys.argv[1])), 0.2); time.sleep(120)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True,
                          text=True, timeout=100)  # fmt: skip
    assert done.returncode == gpu.LATE and "LATE run: did not end in 0 s" in done.stdout
    assert json.loads(path.read_text())["sections"][0]["status"] == "late"


@pytest.mark.parametrize("state", ["failed", "ok"])
def test_the_timer_ends_a_process_whose_report_is_held(tmp_path: Path, state: str) -> None:
    """Even in the middle of a write; a failed check keeps its exit code."""
    script = (
        "import sys, time; from dit_bench import gpu; from dit_bench.gpu_report import Report\n"
        "gpu.LAST_WORDS_SECONDS = 0.2; report = Report(None)\n"
        f"report.record('operators', {{'status': {state!r}, 'reason': 'r'}})\n"
        "gpu.stop_late(report, 0.2); report._lock.acquire(); time.sleep(120)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=100)
    assert done.returncode == (1 if state == "failed" else gpu.LATE)
