"""The operators in the GPU benchmark: checked before they are timed, figures in closed form."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_runs import CPU, measured
from products import has_int8

import dit_kernels
from dit_bench import operators
from dit_bench.ceilings import Ceilings
from dit_bench.gpu import Plan
from dit_bench.gpu_inputs import loop_flops
from dit_bench.gpu_table import format_table
from dit_bench.operator_cases import all_cases, block_cases, vae_cases
from dit_bench.operator_checks import Target, largest, relative_error
from dit_bench.operator_contenders import implementations, opponents
from dit_bench.operators import figures, least_traffic
from dit_bench.timing import Interleaved
from dit_engine.config import ModelConfig
from dit_kernels import reference

right = reference.gate_residual


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda *a: right(*a) + 0.05, "times the reference's, allowed is 2"),
        (lambda *a: torch.full_like(right(*a), math.nan), "error nan"),
        # Nothing is written to memory that is new, or that holds what was there before.
        (lambda x, *_: torch.zeros_like(x), "times the reference's"),
        (lambda x, *_: x.clone(), "times the reference's"),
        (lambda *a: right(*a)[:, :-1], "error inf"),
    ],
)
def test_a_wrong_operator_is_recorded_and_not_timed(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Any, reason: str
) -> None:
    monkeypatch.setattr(dit_kernels, "gate_residual", lambda *arguments, impl: wrong(*arguments))
    code, values = measured(replace(plan, configs={}), tmp_path / "gpu.json")
    assert code == 1
    rows = {r["operator"]: r for r in values["operators"]}
    failed = rows.pop("gate_residual")
    assert failed["status"] == "failed" and "ms" not in failed
    assert re.search(reason, failed["reason"])
    assert all(r["status"] == "ok" and "ms" in r for r in rows.values())
    assert "\nFAILED gate_residual " in format_table(values)


def test_an_operator_that_raises_fails_and_one_that_is_missing_is_skipped(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, impl: str) -> torch.Tensor:
        raise RuntimeError("out of\nregisters")

    monkeypatch.setattr(dit_kernels, "gate_residual", broken)
    plan = replace(plan, configs={}, impls=("reference", "triton"))
    code, values = measured(plan, tmp_path / "gpu.json")
    rows = {(r["operator"], r["impl"]): r for r in values["operators"]}
    assert code == 1
    assert rows["gate_residual", "reference"]["reason"] == "RuntimeError: out of registers"
    assert rows["attention", "triton"]["status"] == "skipped"
    assert "triton" in rows["attention", "triton"]["reason"]


def test_figures_in_closed_form() -> None:
    case = block_cases(1, 4, 48, 2, torch.bfloat16, timed=True)
    ceilings = Ceilings(8.0, {"bf16": 0.5, "int8": 4.0}, 1, 1)
    taken = Interleaved({"fused": [1.0, 2.0, 4.0], "eager": [3.0, 6.0, 12.0]})
    attention = replace(next(c for c in case if c.operator == "attention"), flops=10**9)
    found = figures(attention, "fused", taken, 0, ceilings)
    assert found["ms"]["median"] == 2 and found["rounds"] == 3
    assert found["rate"] == pytest.approx(0.5) and found["percent_of_ceiling"] == 100  # 1e9 in 2 ms
    assert found["speedup_over"] == {"eager": 3.0}
    int8 = replace(next(c for c in case if c.operator == "linear_int8"), flops=10**9)
    assert figures(int8, "fused", taken, 0, ceilings)["percent_of_ceiling"] == 12.5
    moved = figures(case[0], "fused", taken, 4 * 10**6, ceilings)
    assert (moved["rate"], moved["unit"], moved["percent_of_ceiling"]) == (2.0, "GB/s", 25.0)


def test_operations_and_bytes_in_closed_form() -> None:
    n, t, d = 2, 16, 48
    cases = {(c.operator, c.shape): c for c in block_cases(n, t, d, 2, torch.bfloat16, timed=True)}
    assert cases["attention", "N=2 T=16 H=2 d=24"].flops == 2 * n * 2 * t * t * d
    assert cases["linear_gelu", "R=32 48→192"].flops == 2 * n * t * d * 4 * d
    x, y, gate = cases["gate_residual", "N=2 T=16 D=48"].inputs(CPU)
    assert least_traffic((x, y, gate, 7), (x,)) == 2 * (3 * n * t * d + n * d)
    config = ModelConfig.named("DiT-XL/2")
    # The paper's 118.6 GMACs without adaLN and embedding: 28·6·D² + 2·D² + …, 0.23 of them.
    assert loop_flops(config) / 2e9 == pytest.approx(118.6 - 0.23, abs=0.05)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_public_operator_has_a_case_that_is_timed(device: str) -> None:
    public = {n for n in dit_kernels.__all__ if n[0].islower() and n != "available"}
    timed = {c.operator for c in all_cases(torch.device(device)) if c.timed}
    quantized = {"linear_int8" if device == "cpu" else "linear_fp8"}
    assert timed == public | quantized


def test_the_checks_accept_the_reference_and_what_plain_models_run() -> None:
    """At the checked shapes that are not timed, and at a small block's timed ones."""
    cases = [c for c in all_cases(CPU) if not c.timed]
    assert {c.shape.split("D=")[1].split()[0] for c in cases if "D=" in c.shape} == {
        "384", "768", "1024", "1152"}  # fmt: skip
    small = block_cases(2, 5, 48, 2, torch.bfloat16, timed=True)
    cases = [c for c in cases if "T=10" not in c.shape]  # a second each, in float64
    missing = {"linear_fp8"} | (set() if has_int8() else {"linear_int8"})
    for case in (*cases, *(c for c in small if c.operator not in missing)):
        target = Target(case, case.inputs(CPU))
        for find in implementations(case, CPU, ("reference",)).values():
            ratio, error = target.worst(find())
            assert ratio <= 2 and error < 0.1, case
        found = opponents(case, CPU)
        assert target.worst(found["eager"]())[0] <= operators.OPPONENT_RATIO, case


def test_the_largest_of_errors_keeps_a_nan() -> None:
    assert largest([1.0, 3.0, 2.0]) == 3.0
    assert math.isnan(largest([1.0, math.nan])) and math.isnan(largest([math.nan, 1.0]))
    a = torch.tensor([1.0, -4.0])
    assert relative_error(a + torch.tensor([0.0, 1.0]), a) == 0.25
    assert relative_error(a[:1], a) == math.inf


def test_what_torch_compile_is_given_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opponents that do not compile are only skipped: a missing column must not pass unnoticed."""
    compiler = torch.compile
    # What is traced, without Inductor's half of a minute.
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend="eager", **how))
    cases = block_cases(2, 5, 48, 2, torch.bfloat16, timed=True)
    compiled = []
    for case in [*cases, *vae_cases(torch.bfloat16, 1, timed=True)[:1]]:
        if "compile" in (found := opponents(case, CPU)):
            target = Target(case, case.inputs(CPU))
            assert target.worst(found["compile"]())[0] <= operators.OPPONENT_RATIO, case
            compiled.append(case.operator)
    timed = {case.operator for case in all_cases(torch.device("cuda")) if case.timed}
    assert set(compiled) == timed - {"linear_fp8"}
