"""Runs of the GPU benchmark on a CPU, for its tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dit_bench.budget import Budget
from dit_bench.gpu import Plan, run
from dit_bench.gpu_contenders import Contender
from dit_bench.gpu_report import Report

CPU = torch.device("cpu")
LEAN = Contender("lean bf16", "lean", "bf16")


def measured(plan: Plan, path: Path, seconds: float = 300.0) -> tuple[int, dict[str, Any]]:
    """The exit code, and what the JSON file holds."""
    report = Report(path)
    code = run(plan, report, Budget(seconds))
    assert report.path is not None
    return code, json.loads(report.path.read_text())
