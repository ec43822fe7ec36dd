"""The GPU benchmark's JSON, its short table, and what it tells of the machine."""

from __future__ import annotations

import json
import math
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dit_bench import gpu_environment
from dit_bench.gpu_environment import gpu_state
from dit_bench.gpu_report import Report
from dit_bench.gpu_table import LINE_LIMIT, format_table


def test_numbers_that_json_lacks_become_text(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    report = Report(path)
    report.record("rows", {"error": math.nan, "nested": {"list": [math.inf, 1.5]}})
    report.finish()
    rows = json.loads(path.read_text(), parse_constant=pytest.fail)["rows"]
    assert rows == [{"error": "nan", "nested": {"list": ["inf", 1.5]}}]


def test_the_table_is_never_longer_than_its_limit() -> None:
    ms = {"q10": 1.0, "median": 1.0, "q90": 1.0}
    operator = {"operator": "attention", "shape": "s", "dtype": "bf16", "impl": "triton",
                "status": "ok", "error": 0.1, "ms": ms, "rate": 1.0, "unit": "GB/s",
                "percent_of_ceiling": None, "speedup_over": {"eager": 2.0}}  # fmt: skip
    values = {"environment": {"gpu": "G", "torch": "2", "python": "3"},
              "operators": [operator] * 50,
              "forwards": [{"model": f"M{i}", "contender": "eager bf16", "batch": 1,
                            "status": "ok", "ms": ms} for i in range(30)],
              "generate": [{"model": "M0", "contender": "x", "batch": 1, "status": "failed",
                            "reason": "r"}] * 20}  # fmt: skip
    lines = format_table(values).split("\n")
    assert len(lines) == LINE_LIMIT and "more lines" in "\n".join(lines)
    assert "12 more failures" in lines[-2]
    assert lines[-1] == "incomplete: 20 failed, 0 skipped"


def test_nvidia_smi_is_asked_and_its_gaps_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    commands: list[list[str]] = []

    def answer(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(stdout="1980, 3201, 1980, 412.51, [N/A], 55\n")

    monkeypatch.setattr(subprocess, "run", answer)
    state = gpu_state(torch.device("cuda"))
    assert state == {"sm_mhz": 1980, "memory_mhz": 3201, "sm_max_mhz": 1980, "power_w": 412.51,
                     "power_limit_w": None, "temperature_c": 55}  # fmt: skip
    assert "clocks.sm,clocks.mem" in commands[0][1]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    assert set(gpu_state(torch.device("cuda")).values()) == {None}


def test_the_environment_of_a_gpu_whose_torch_tells_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    few = SimpleNamespace(name="G", total_memory=3 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: few)
    commands: list[list[str]] = []

    def answer(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(stdout="570.1\n")

    monkeypatch.setattr(subprocess, "run", answer)
    monkeypatch.setattr(gpu_environment, "describe_hardware", dict)
    monkeypatch.setattr(gpu_environment, "_implementations", dict)
    found = gpu_environment.describe_environment(torch.device("cuda"))
    assert (found["gpu"], found["compute_capability"], found["driver"]) == ("G", "9.0", "570.1")
    assert (found["memory_gib"], found["l2_mib"], found["multiprocessors"]) == (3.0, None, None)
    assert not any(part.startswith("--id") for part in commands[0])


def test_threads_may_record_and_read_at_once(tmp_path: Path) -> None:
    report = Report(tmp_path / "r.json")
    with ThreadPoolExecutor(8) as pool:
        for i in range(80):
            pool.submit(report.record, f"section {i % 20}", {"status": "ok", "i": i})
            pool.submit(report.snapshot)
    report.finish()
    values = json.loads((tmp_path / "r.json").read_text())
    assert sorted(r["i"] for k, rows in values.items() if k != "complete" for r in rows) == [
        *range(80)
    ]
