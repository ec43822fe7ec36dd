"""The operators of the benchmark: checked before they are timed, figures in closed form."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from products import has_int8

import dit_kernels
from dit_bench import ceilings, cli, machine
from dit_bench.ceilings import Ceilings
from dit_bench.report import finite, read, validate
from dit_bench.speed import operators
from dit_bench.speed.operator_cases import all_cases, block_cases, vae_cases
from dit_bench.speed.operator_contenders import (
    Target,
    implementations,
    largest_error,
    opponents,
    public,
)
from dit_bench.speed.operators import DeviceLost, figures, least_traffic
from dit_bench.timing import Budget
from dit_kernels import quantized, reference

CPU = torch.device("cpu")
BEST = Ceilings(8.0, {"bf16": 0.5, "int8": 4.0}, 1, 1)
CASES = block_cases(2, 5, 48, 2, torch.bfloat16, timed=True)
right = reference.gate_residual


def by_reference(case: Any, device: torch.device) -> dict[str, Any]:
    return {"reference": lambda: public(case, "reference")}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Rows of the first four cases, by the reference alone."""
    monkeypatch.setattr(operators, "opponents", lambda case, device: {})

    def measure(cases: Any = CASES[:4], seconds: float = 300.0) -> list[dict[str, Any]]:
        report = json.loads(json.dumps(REPORT))
        with torch.inference_mode():
            operators.measure(cases, report, CPU, Budget(seconds), BEST, rounds=2,
                              find=by_reference)  # fmt: skip
        validate(finite(report))
        return report["rows"]

    return measure


@pytest.mark.parametrize(
    ("wrong", "status", "reason"),
    [
        (lambda *a: right(*a) + 0.05, "wrong", "times the reference's, allowed is 2"),
        (lambda *a: torch.full_like(right(*a), math.nan), "wrong", "error nan"),
        # Nothing is written to memory that is new, or that holds what was there before.
        (lambda x, *_: torch.zeros_like(x), "wrong", "times the reference's"),
        (lambda x, *_: x.clone(), "wrong", "times the reference's"),
        (lambda *a: right(*a)[:, :-1], "wrong", "error inf"),
        (lambda *a: {}["x"], "failed", "KeyError: 'x'"),
    ],
)
def test_a_wrong_operator_is_recorded_and_not_timed(
    measured: Any, monkeypatch: pytest.MonkeyPatch, wrong: Any, status: str, reason: str
) -> None:
    monkeypatch.setattr(dit_kernels, "gate_residual", lambda *arguments, impl: wrong(*arguments))
    rows = {row["operator"]: row for row in measured()}
    failed = rows.pop("gate_residual")
    assert failed["status"] == status and "ms" not in failed
    assert re.search(reason, failed["reason"])
    assert all(r["status"] == "ok" and r["ms"]["median"] > 0 for r in rows.values())
    assert all(r["error_over_reference"] == 1.0 for r in rows.values())


def test_what_cannot_run_or_has_no_time_is_skipped(measured: Any) -> None:
    report = json.loads(json.dumps(REPORT))
    find = {"triton": lambda: public(CASES[3], "triton")}
    row = operators.rows_of(CASES[3], CPU, find, {}, 2, BEST)[0]
    assert row["status"] == "skipped" and "triton" in row["reason"]
    assert {row["reason"] for row in measured(seconds=0.0)} == {"no time was left"}
    operators.measure_third_party(CASES, report, CPU, BEST, 2)
    assert report["rows"] == []  # they are for CUDA


def test_kernels_of_other_packages_may_lose_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def wild(*_: Any) -> Any:
        raise DeviceLost("the device failed in wild: an illegal memory access")

    class Cuda:
        type = "cuda"

    attention = CASES[3]
    monkeypatch.setattr(operators, "THIRD_PARTY", {"wild": wild})
    monkeypatch.setattr(operators, "implementations", lambda *_: {})
    honest = operators.rows_of
    monkeypatch.setattr(operators, "rows_of", lambda case, _, *more: honest(case, CPU, *more))
    monkeypatch.setattr(operators, "_check", lambda *_: wild())
    report: dict[str, Any] = {"rows": []}
    operators.measure_third_party([attention], report, Cuda(), BEST, 2)  # pyright: ignore[reportArgumentType]
    (row,) = report["rows"]
    assert row["status"] == "skipped" and "illegal memory access" in row["reason"]


def test_figures_in_closed_form() -> None:
    samples = {"fused": [1.0, 2.0, 4.0], "eager": [3.0, 6.0, 12.0]}
    attention = replace(CASES[3], flops=10**9)
    found = figures(attention, "fused", samples, 0, BEST)
    assert found["ms"]["median"] == 2 and found["ms"]["n"] == 3
    assert found["rate"] == pytest.approx(0.5) and found["percent_of_ceiling"] == 100  # 1e9 in 2 ms
    assert found["speedup_over"] == {"eager": 3.0}
    int8 = replace(next(c for c in CASES if c.operator == "linear_int8"), flops=10**9)
    assert figures(int8, "fused", samples, 0, BEST)["percent_of_ceiling"] == 12.5
    moved = figures(CASES[0], "fused", samples, 4 * 10**6, BEST)
    assert (moved["rate"], moved["unit"], moved["percent_of_ceiling"]) == (2.0, "GB/s", 25.0)


def test_operations_and_bytes_in_closed_form() -> None:
    n, t, d = 2, 16, 48
    cases = {(c.operator, c.shape): c for c in block_cases(n, t, d, 2, torch.bfloat16, timed=True)}
    assert cases["attention", "N=2 T=16 H=2 d=24"].flops == 2 * n * 2 * t * t * d
    assert cases["linear_gelu", "R=32 48→192"].flops == 2 * n * t * d * 4 * d
    x, y, gate = cases["gate_residual", "N=2 T=16 D=48"].inputs(CPU)
    assert least_traffic((x, y, gate, 7), (x,)) == 2 * (3 * n * t * d + n * d)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_public_operator_has_a_case_that_is_timed(device: str) -> None:
    public_names = {n for n in dit_kernels.__all__ if n[0].islower() and n != "available"}
    timed = {c.operator for c in all_cases(torch.device(device)) if c.timed}
    quantized_ones = {"linear_int8" if device == "cpu" else "linear_fp8"}
    assert timed == public_names | quantized_ones


def test_the_checks_accept_the_reference_and_what_plain_models_run() -> None:
    """At the checked shapes that are not timed, and at a small block's timed ones."""
    cases = [c for c in all_cases(CPU) if not c.timed]
    for case in [*cases, *CASES]:
        if case.operator in ("linear_int8", "linear_fp8") and not has_int8:
            continue
        target = Target(case, case.inputs(CPU))
        if not case.operator.startswith("linear_"):
            ratio, error = target.worst(public(case, "reference"))
            assert ratio <= 2 and error < 0.1, case
        if case.operator == "linear_int8":
            assert target.worst(implementations(case, CPU)["packed"]())[0] <= 2, case
        found = opponents(case, CPU)
        assert target.worst(found["eager"]())[0] <= operators.OPPONENT_RATIO, case


def test_the_largest_of_errors_keeps_a_nan() -> None:
    target = Target(CASES[2], CASES[2].inputs(CPU))
    for outcomes in ([math.nan, 0.0], [0.0, math.nan]):  # of the two calls

        def run(*_: Any, left: list[float] = outcomes) -> torch.Tensor:
            return target.exact[0] + left.pop()

        assert all(map(math.isnan, target.worst(run)))
    a = torch.tensor([1.0, -4.0])
    assert largest_error(a + torch.tensor([0.0, 1.0]), a) == 0.25
    assert largest_error(a[:1], a) == math.inf


def test_what_torch_compile_is_given_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opponents that do not compile are only skipped: a missing column must not pass unnoticed."""
    compiler = torch.compile
    # What is traced, without Inductor's half of a minute.
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend="eager", **how))
    compiled = []
    for case in [*CASES, *vae_cases(torch.bfloat16, 1, timed=True)[:1]]:
        if "compile" in (found := opponents(case, CPU)):
            target = Target(case, case.inputs(CPU))
            assert target.worst(found["compile"]())[0] <= operators.OPPONENT_RATIO, case
            compiled.append(case.operator)
    timed = {case.operator for case in all_cases(torch.device("cuda")) if case.timed}
    assert set(compiled) == timed - {"linear_fp8"}


def test_an_fp8_product_and_its_ceiling_add_up_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def product(a: torch.Tensor, b: torch.Tensor, *_: Any, use_fast_accum: bool, **__: Any) -> Any:
        asked.append(use_fast_accum)
        return torch.zeros(len(a), b.shape[1], dtype=torch.bfloat16)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    monkeypatch.setattr(torch.ops.aten, "_scaled_mm", product)
    ceilings.matmul(CPU, ceilings.FP8, 16)()
    monkeypatch.setattr(quantized, "quantized_why_not", lambda *_: None)
    layer = quantized.QuantizedLinear(torch.randn(16, 16), torch.zeros(16), "fp8", torch.bfloat16)
    layer(torch.zeros(2, 16).to(ceilings.FP8), torch.ones(2))
    assert asked == [quantized.FAST_ACCUMULATION] * 2


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Waiting for an idle machine takes half of the minutes at most; what is printed then says that
    the machine was busy. Ctrl-C keeps what is finished."""
    slept: list[float] = []
    monkeypatch.setattr(machine, "load_average", lambda: 3.0)
    monkeypatch.setattr(operators, "load_average", lambda: 3.0)
    monkeypatch.setattr(machine.time, "sleep", slept.append)
    monkeypatch.setattr(operators, "measure_ceilings", lambda _: BEST)
    monkeypatch.setattr(operators, "all_cases", lambda _: CASES[:2])
    monkeypatch.setattr(operators, "opponents", lambda case, device: {})
    path = tmp_path / "a.json"
    options = ["operators", "--device", "cpu", "--json", str(path), "--rounds", "1"]
    for minutes, most in (("0.4", 12.0), ("10", 180.0)):
        slept.clear()
        assert cli.main([*options, "--minutes", minutes]) == 0
        assert sum(slept) == pytest.approx(most, abs=0.1)
        shown = capsys.readouterr().out
        assert f"{most:.0f} s at most" in shown and "layernorm_modulate" in shown
    report = read(path, "operators")
    assert report["complete"] and [row["contender"] for row in report["rows"]] == ["native"] * 2

    def interrupted(case: Any, *_: Any) -> Any:
        if case is CASES[1]:
            raise KeyboardInterrupt
        return {}

    monkeypatch.setattr(operators, "opponents", interrupted)
    assert cli.main([*options, "--minutes", "10"]) == 130
    assert len(read(path)["rows"]) == 1 and not read(path)["complete"]
    for wrong, said in (
        (["--minutes", "0"], "minutes 0 is not a finite number above 0"),
        (["--only", "softmax"], "--only 'softmax' is part of no operator's name"),
    ):
        assert cli.main([*options, *wrong]) == 2
        assert said in capsys.readouterr().err


REPORT = {
    "schema": "dit-bench/3", "kind": "operators", "created": "", "command": [], "settings": {},
    "machine": {"cpu": "x", "device": "cpu", "threads": 1, "instruction_sets": [], "versions": {}},
    "rows": [], "complete": True,
}  # fmt: skip
