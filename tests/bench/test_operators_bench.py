"""The operators of the benchmark: checked before they are timed, figures in closed form."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up
import pytest
import torch
from products import has_int8
from triton_workers import interpreted

import dit_kernels
from dit_bench import cli, machine
from dit_bench.ceilings import Ceilings
from dit_bench.report import finite, read, validate
from dit_bench.speed import operators
from dit_bench.speed.operator_cases import (
    Case,
    _products,
    all_cases,
    cases_of,
    implementations,
    opponents,
    public,
)
from dit_bench.speed.operators import Target, figures, largest_error, least_traffic
from dit_bench.timing import Budget
from dit_kernels import reference

CPU = torch.device("cpu")
BEST = Ceilings(8.0, {"bf16": 0.5, "int8": 4.0}, 1, 1)
CASES = [c for c in cases_of(2, 5, 64, 2) if "256x256" not in c.shape]
right = reference.gate_residual


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Rows of the first four cases, by the reference alone."""
    monkeypatch.setattr(operators, "opponents", lambda case, device: {})
    monkeypatch.setattr(operators, "implementations", lambda case, device: {
        "reference": public(case, "reference"), "triton": public(case, "triton")})  # fmt: skip

    def measure(seconds: float = 300.0) -> list[dict[str, Any]]:
        report = made_up.operators() | {"rows": []}
        with torch.inference_mode():
            operators.measure(CASES[:4], report, CPU, Budget(seconds), BEST, rounds=2)
        validate(finite(report))
        return report["rows"]

    return measure


@pytest.mark.parametrize(
    ("wrong", "status", "reason"),
    [
        (lambda *a: right(*a) + 0.05, "wrong", "times the reference's, allowed is 2"),
        (lambda *a: torch.full_like(right(*a), math.nan), "wrong", "error nan"),
        # Nothing is written to memory that is new.
        (lambda x, *_: torch.zeros_like(x), "wrong", "times the reference's"),
        (lambda *a: right(*a)[:, :-1], "wrong", "error inf"),
        (lambda *a: {}["x"], "failed", "KeyError: 'x'"),
    ],
)
def test_a_wrong_operator_is_recorded_and_not_timed(
    measured: Any, monkeypatch: pytest.MonkeyPatch, wrong: Any, status: str, reason: str
) -> None:
    """And what cannot run here is skipped."""
    monkeypatch.setattr(dit_kernels, "gate_residual", lambda *arguments, impl: wrong(*arguments))
    found = measured()
    rows = {row["operator"]: row for row in found if row["contender"] == "reference"}
    failed = rows.pop("gate_residual")
    assert failed["status"] == status and "ms" not in failed
    assert re.search(reason, failed["reason"])
    assert len(rows) == 3 and all(r["ms"]["median"] > 0 for r in rows.values())
    assert all(r["error_over_reference"] == 1.0 for r in rows.values())
    (skipped,) = [r for r in found if r["contender"] == "triton" and r["operator"] == "attention"]
    assert skipped["status"] == "skipped" and "triton" in skipped["reason"]


def test_without_time_everything_is_skipped(measured: Any) -> None:
    assert {row["reason"] for row in measured(seconds=0.0)} == {"no time was left"}


def test_figures_in_closed_form() -> None:
    samples = {"fused": [1.0, 2.0, 4.0], "eager": [3.0, 6.0, 12.0]}
    found = figures(replace(CASES[3], flops=10**9), "fused", samples, 0, BEST)
    assert found["ms"]["median"] == 2 and found["ms"]["n"] == 3
    assert found["rate"] == pytest.approx(0.5) and found["percent_of_ceiling"] == 100  # 1e9 in 2 ms
    assert found["speedup_over"] == {"eager": 3.0}
    int8 = replace(next(c for c in CASES if c.operator == "linear_int8"), flops=10**9)
    assert figures(int8, "fused", samples, 0, BEST)["percent_of_ceiling"] == 12.5
    moved = figures(CASES[0], "fused", samples, 4 * 10**6, BEST)
    assert (moved["rate"], moved["unit"], moved["percent_of_ceiling"]) == (2.0, "GB/s", 25.0)
    n, t, d = 2, 5, 64
    cases = {c.title: c for c in CASES}
    assert cases["attention N=2 T=5 H=2 d=32"].flops == 2 * n * 2 * t * t * d
    assert cases["linear_gelu R=10 64→256"].flops == 2 * n * t * d * 4 * d
    x, y, gate = cases["gate_residual N=2 T=5 D=64"].inputs(CPU)
    assert least_traffic((x, y, gate, 7), (x,)) == 2 * (3 * n * t * d + n * d)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_public_operator_has_a_case(device: str) -> None:
    public_names = {n for n in dit_kernels.__all__ if n[0].islower() and n != "available"}
    cases = {case.operator for case in all_cases(torch.device(device))}
    assert cases == public_names | {"linear_int8" if device == "cpu" else "linear_fp8"}


@pytest.mark.slow
@interpreted
def test_our_products_in_every_tiling_of_the_chooser_are_right() -> None:
    for case in cases_of(1, 64, 64, 1):
        if case.operator in ("linear", "linear_gelu"):
            target = Target(case, case.inputs(CPU))
            found = _products(case, CPU)
            assert found
            for name, run in found.items():
                assert target.worst(run(*target.arguments))[0] <= operators.ERROR_RATIO, name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_the_checks_accept_the_reference_and_what_plain_models_run(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what torch.compile is given is one graph: opponents that do not compile are only skipped,
    and a missing column must not pass unnoticed."""
    compiler = torch.compile
    # What is traced, without Inductor's half of a minute.
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend="eager", **how))
    target = Target(case, case.inputs(CPU))
    if not case.operator.startswith("linear_"):
        ratio, error = target.worst(public(case, "reference")(*target.arguments))
        assert ratio <= 2 and error < 0.1
    if case.operator == "linear_int8" and has_int8():
        packed = implementations(case, CPU)["packed"]
        assert target.worst(packed(*target.arguments))[0] <= 2
    found = opponents(case, CPU)
    assert ("compile" in found) is (case.operator not in ("linear_int8", "linear_fp8"))
    for make in found.values():
        assert target.worst(make(*target.arguments))[0] <= operators.OPPONENT_RATIO


def test_the_largest_of_errors_keeps_a_nan() -> None:
    target = Target(CASES[2], CASES[2].inputs(CPU))
    for outcomes in ([math.nan, 0.0], [0.0, math.nan]):  # of the two calls
        left = list(outcomes)
        assert all(map(math.isnan, target.worst(lambda left=left: target.exact[0] + left.pop())))
    a = torch.tensor([1.0, -4.0])
    assert largest_error(a + torch.tensor([0.0, 1.0]), a) == 0.25


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It waits for an idle machine half of the minutes at most. Ctrl-C keeps what is finished."""
    slept: list[float] = []
    monkeypatch.setattr(machine, "load_average", lambda: 3.0)
    monkeypatch.setattr(machine.time, "sleep", slept.append)
    monkeypatch.setattr(operators, "measure_ceilings", lambda _: BEST)
    monkeypatch.setattr(operators, "all_cases", lambda _: CASES[:2])

    def interrupted(case: Any, *_: Any) -> Any:
        if case is CASES[1]:
            raise KeyboardInterrupt
        return {}

    monkeypatch.setattr(operators, "opponents", interrupted)
    path = tmp_path / "a.json"
    options = ["operators", "--device", "cpu", "--json", str(path), "--rounds", "1"]
    assert cli.main([*options, "--minutes", "0.4"]) == 130
    assert sum(slept[:3]) == pytest.approx(12.0, abs=0.1)
    report = read(path, "operators")
    assert not report["complete"] and [row["contender"] for row in report["rows"]] == ["native"]
    for wrong, said in (
        (["--minutes", "0"], "minutes 0 is not a finite number above 0"),
        (["--only", "softmax"], "--only 'softmax' is part of no operator's name"),
    ):
        assert cli.main([*options, *wrong]) == 2
        assert said in capsys.readouterr().err
