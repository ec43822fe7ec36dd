"""The VAE's decoder in the GPU benchmark."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_runs import CPU

from dit_bench import gpu_vae
from dit_bench.budget import Budget
from dit_bench.gpu import Plan
from dit_bench.gpu_report import Report
from dit_bench.gpu_table import format_table


def decoded(plan: Plan, seconds: float = 300.0) -> dict[tuple[str, int], dict[str, Any]]:
    report = Report(None)
    benchmark = gpu_vae.DecodeBenchmark(
        report, CPU, Budget(seconds), plan.vae, plan.decoded_side, (1, 2), rounds=2
    )
    with torch.inference_mode():
        benchmark.run()
    return {(r["contender"], r["batch"]): r for r in report.values["decode"]}


def test_decoders(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_vae, "_compiled", gpu_vae._eager)  # the compiler has its own tests
    rows = decoded(plan)
    assert len(rows) == 8 and {r["status"] for r in rows.values()} == {"ok"}
    for batch in (1, 2):
        eager = rows["eager bf16", batch]
        assert eager["speedup_over_eager"] == 1 and eager["pixels"] == 8
        lean = rows["lean bf16", batch]
        assert 0 < lean["error"] <= 2 * eager["error"] and lean["ms"]["median"] > 0
        exact = rows["lean fp32", batch]
        assert 0 < exact["error"] < 1e-5 and "ms" not in exact
    assert "decode 8 px, batch 2: eager bf16" in format_table({"decode": list(rows.values())})
    assert {r["reason"] for r in decoded(plan, 0).values()} == {"time budget"}


def test_a_wrong_decoder_fails_and_is_not_timed(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gpu_vae.LeanDecoder.__call__
    monkeypatch.setattr(gpu_vae.LeanDecoder, "__call__", lambda self, z: 1.05 * right(self, z))
    monkeypatch.setattr(gpu_vae, "_compiled", lambda vae: 1 / 0)
    rows = decoded(plan)
    for batch in (1, 2):
        assert rows["eager bf16", batch]["status"] == "ok"
        for name in ("lean bf16", "lean fp32"):
            row = rows[name, batch]
            assert row["status"] == "failed" and "ms" not in row
            assert row["error"] == pytest.approx(0.05, abs=0.03)
        assert rows["compile bf16", batch]["reason"] == "ZeroDivisionError: division by zero"
