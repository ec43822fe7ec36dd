"""The GPU benchmark's course on a CPU: what it checks, records, skips and refuses to time."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_dit, tiny_vae

import dit_kernels
from dit_bench import (
    gpu,
    gpu_contenders,
    gpu_environment,
    gpu_models,
    gpu_peers,
    gpu_vae,
    operators,
)
from dit_bench.budget import Budget
from dit_bench.ceilings import Ceilings
from dit_bench.gpu import Plan, run
from dit_bench.gpu_contenders import EAGER, Contender
from dit_bench.gpu_environment import gpu_state
from dit_bench.gpu_inputs import loop_flops, random_model
from dit_bench.gpu_report import Report
from dit_bench.gpu_table import LINE_LIMIT, format_table
from dit_bench.operator_cases import all_cases, block_cases
from dit_bench.operator_checks import DeviceLost, Target, largest, relative_error
from dit_bench.operator_contenders import implementations, opponents
from dit_bench.operators import figures, least_traffic
from dit_bench.timing import Interleaved
from dit_engine import backends
from dit_engine.backends.eager import EagerBackend
from dit_engine.config import ModelConfig
from dit_engine.engine import Engine
from dit_engine.errors import BackendUnavailable
from dit_kernels import reference

CPU = torch.device("cpu")
LEAN = Contender("lean bf16", "lean", "bf16")
ABSENT = {"absent": "its package is not installed", "remote": "an address is needed"}
SECTIONS = ["ceilings", "operators", "decode", "models", "other packages' attention"]


class WrongBackend(EagerBackend):
    """Off by a tenth."""

    def prepare(self, labels: torch.Tensor, timesteps: torch.Tensor) -> Any:
        right = super().prepare(labels, timesteps)
        return lambda x, step: 1.1 * right(x, step)


class BrokenBackend(EagerBackend):
    def prepare(self, labels: torch.Tensor, timesteps: torch.Tensor) -> Any:
        raise RuntimeError("kernel image is\ninvalid")


class AbsentBackend(EagerBackend):
    def __init__(self, *_: Any) -> None:
        raise BackendUnavailable(ABSENT["absent"])


class RemoteBackend(EagerBackend):
    def __init__(self, *_: Any) -> None:
        raise ValueError(ABSENT["remote"])


@pytest.fixture
def plan() -> Plan:
    return Plan(
        CPU,
        {"tiny": tiny_dit().config},
        block_cases(2, 5, 48, 2, torch.bfloat16, timed=True)[:4],
        contenders=(EAGER,),
        batches=(1, 2),
        images=(1,),
        rounds=2,
        ceilings={"size": 16, "copy_mib": 1, "rounds": 2},
        impls=("reference",),
        opposed=False,
        vae=tiny_vae().config,
        decoded_side=4,
    )


def measured(plan: Plan, path: Path, seconds: float = 300.0) -> tuple[int, dict[str, Any]]:
    code = run(plan, Report(path), Budget(seconds))
    return code, json.loads(path.read_text())


def test_without_cuda_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "gpu.json"
    assert gpu.main(["--json", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: no CUDA device: ")
    assert not path.exists()


def test_bad_arguments_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.main(["--sizes", "M/2"]) == 2
    assert "model 'M/2' is unknown" in capsys.readouterr().err
    assert gpu.main(["--minutes", "0.1"]) == 2
    assert "minutes 0.1 is not above 0.5" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert operators.main(["--device", "cpu", "--only", "softmax"]) == 2
    assert "--only 'softmax' is part of no operator's name" in capsys.readouterr().err


def test_a_whole_run(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contenders = (
        EAGER,
        LEAN,
        Contender("lean bf16 step", "lean", "bf16", "step"),
        Contender("eager bf16 step", "eager", "bf16", "step"),
        Contender("lean fp32", "lean", "fp32", timed=False),
        Contender("lean fp8", "lean", "fp8", late=True),
        Contender("absent bf16", "absent", "bf16", batches=(2,), added=True),
        Contender("remote bf16", "remote", "bf16", batches=(2,), added=True),
    )
    monkeypatch.setitem(backends._FACTORIES, "absent", (__name__, "AbsentBackend"))
    monkeypatch.setitem(backends._FACTORIES, "remote", (__name__, "RemoteBackend"))
    code, values = measured(replace(plan, contenders=contenders), tmp_path / "gpu.json")
    assert code == 0 and values["complete"] is True and values["seconds"] > 0
    assert [r["section"] for r in values["sections"]] == SECTIONS
    assert values["environment"]["torch"] == torch.__version__
    assert "diffusers" in values["environment"]["packages"]
    assert set(values["ceilings"]["matmul_tflop_s"]) == {"fp32", "bf16"}
    for row in values["operators"]:
        assert row["status"] == "ok" and row["error_over_reference"] == 1.0
        assert 0 < row["ms"]["q10"] <= row["ms"]["median"] <= row["ms"]["q90"]
    forwards = {(r["contender"], r["batch"]): r for r in values["forwards"]}
    for batch in (1, 2):
        assert forwards["eager bf16", batch]["speedup_over_eager"] == 1.0
        for name in ("lean bf16", "lean bf16 step"):
            row = forwards[name, batch]
            assert row["ms"]["median"] > 0 and row["error"] <= 2 * row["eager_bf16_error"]
        assert "no fused sampler step" in forwards["eager bf16 step", batch]["reason"]
        assert forwards["lean fp8", batch]["status"] == "skipped"  # it is for CUDA
    assert ("lean fp32", 1) not in forwards
    exact = forwards["lean fp32", 2]
    assert exact["status"] == "ok" and exact["error"] < 1e-5 and "ms" not in exact
    made = {r["contender"]: r for r in values["generate"]}
    assert made["lean bf16"]["images_per_s"] > 0 and len(made["lean bf16"]["seconds"]) <= 3
    assert set(made) == {"eager bf16", "lean bf16", "lean fp8", "absent bf16", "remote bf16"}
    for name, reason in ABSENT.items():
        assert (f"{name} bf16", 1) not in forwards
        for row in (forwards[f"{name} bf16", 2], made[f"{name} bf16"]):
            assert row["status"] == "skipped" and row["reason"] == reason
    pixels = {r["contender"]: r for r in values["pixels"]}
    assert set(pixels) == set(made) and pixels["lean bf16"]["images_per_s"] > 0
    assert pixels["lean bf16"]["batch"] == 8
    assert pixels["eager bf16"]["rms_error_levels"] > 0
    table = format_table(values).split("\n")
    assert table[-1].startswith("complete in ") and " 0 failed" in table[-1]
    # A line a backend, whose forms share it, and one for the generation to pixels.
    assert len([line for line in table if line.startswith("tiny")]) == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r + 0.05, "times the reference's, allowed is 2"),
        (lambda r: torch.full_like(r, math.nan), "error nan"),
        (lambda r: torch.empty_like(r), "times the reference's|error nan"),
        (lambda r: r[:, :-1], "error inf"),
    ],
)
def test_a_wrong_operator_is_recorded_and_not_timed(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, reason: str
) -> None:
    def wrong(*arguments: Any, impl: str) -> torch.Tensor:
        return change(reference.gate_residual(*arguments))

    monkeypatch.setattr(dit_kernels, "gate_residual", wrong)
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


def test_wrong_and_broken_backends_fail_and_are_not_timed(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WrongBackend", "BrokenBackend"):
        monkeypatch.setitem(backends._FACTORIES, name, (__name__, name))
    contenders = tuple(Contender(n, n, "bf16") for n in ("WrongBackend", "BrokenBackend"))
    plan = replace(plan, contenders=(*contenders, EAGER), cases=[])
    code, values = measured(plan, tmp_path / "gpu.json")
    assert code == 1
    rows = [r for section in ("forwards", "generate") for r in values[section]]
    for row in rows:
        if row["contender"] == "eager bf16":
            assert row["status"] == "ok"
        else:
            assert row["status"] == "failed"
            assert "ms" not in row and "images_per_s" not in row
    wrong = [r for r in rows if r["contender"] == "WrongBackend"]
    assert [r["error"] for r in wrong[:2]] == pytest.approx([0.1, 0.1], abs=0.02)
    assert "latents' rms error" in wrong[2]["reason"]
    assert rows[1]["reason"] == "RuntimeError: kernel image is invalid"


def test_without_time_everything_is_skipped_and_said_so(plan: Plan, tmp_path: Path) -> None:
    code, values = measured(plan, tmp_path / "gpu.json", seconds=0.0)
    assert code == 0 and values["complete"] is True
    assert {r["status"] for r in values["sections"]} == {"skipped"}
    assert {r["reason"] for r in values["sections"]} == {"time budget"}


def test_a_section_that_runs_out_of_time_names_what_it_left(plan: Plan, tmp_path: Path) -> None:
    report = Report(tmp_path / "gpu.json")
    ceilings = Ceilings(1.0, {}, 1, 1)
    operators.OperatorBenchmark(report, CPU, Budget(0), ceilings).run(plan.cases)
    gpu_models.ModelBenchmark(report, CPU, Budget(0), ceilings, (EAGER,), (1,), (1,)).run(
        plan.configs
    )
    assert [r["operator"] for r in report.values["operators"]] == [c.operator for c in plan.cases]
    for row in (*report.values["operators"], *report.values["forwards"]):
        assert row["status"] == "skipped" and row["reason"]


def test_what_was_measured_survives_a_kill(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_models.ModelBenchmark, "run", killed)
    path = tmp_path / "gpu.json"
    with pytest.raises(KeyboardInterrupt):
        run(plan, Report(path), Budget(300))
    values = json.loads(path.read_text())
    assert values["complete"] is False and len(values["operators"]) == len(plan.cases)
    assert values["ceilings"]["copy_gb_s"] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["gpu.json"]


def test_a_broken_section_does_not_end_the_run_but_a_lost_device_does(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(error: Exception) -> Any:
        def measure(*_: Any) -> None:
            raise error

        return measure

    monkeypatch.setattr(operators.OperatorBenchmark, "run", raising(TypeError("a mistake")))
    code, values = measured(plan, tmp_path / "a.json")
    assert code == 1 and values["generate"][0]["status"] == "ok"
    assert values["sections"][1]["reason"] == "TypeError: a mistake"
    assert [r["section"] for r in values["sections"]] == SECTIONS
    monkeypatch.setattr(operators.OperatorBenchmark, "run", raising(DeviceLost("illegal access")))
    code, values = measured(plan, tmp_path / "b.json")
    assert code == 1 and "generate" not in values and values["complete"] is False
    assert values["sections"][-1]["reason"] == "illegal access"


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


def test_numbers_that_json_lacks_become_text(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    report = Report(path)
    report.record("rows", {"error": math.nan, "nested": {"list": [math.inf, 1.5]}})
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
    for case in (*cases, *(c for c in small if c.operator != "linear_fp8")):
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


def test_random_models_have_modulations_that_are_not_zero() -> None:
    model = random_model(tiny_dit().config, CPU)
    assert all(p.abs().max() > 0 for p in model.parameters())
    assert torch.equal(model.pos_embed, tiny_dit().pos_embed)


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


def test_a_model_that_cannot_be_made_fails_and_the_next_is_measured(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = gpu_models.random_model

    def picky(config: ModelConfig, device: torch.device) -> Any:
        if config.depth == 1:
            raise RuntimeError("too shallow")
        return make(config, device)

    monkeypatch.setattr(gpu_models, "random_model", picky)
    config = plan.configs["tiny"]
    configs = {"flat": replace(config, depth=1), "tiny": config}
    code, values = measured(replace(plan, configs=configs, cases=[]), tmp_path / "gpu.json")
    assert code == 1
    assert values["forwards"][0]["reason"] == "RuntimeError: too shallow"
    assert {r["model"] for r in values["generate"]} == {"tiny"}


def test_a_missing_device_property_does_not_end_the_run(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> Any:
        raise AttributeError("no attribute L2_cache_size")

    monkeypatch.setattr(gpu, "describe_environment", missing)
    monkeypatch.setattr(gpu, "gpu_state", missing)
    code, values = measured(replace(plan, configs={}), tmp_path / "gpu.json")
    assert code == 0 and values["complete"] is True
    assert all(r["status"] == "ok" for r in values["operators"])
    lost = [r for r in values["sections"] if r["status"] == "skipped"]
    assert [r["section"] for r in lost] == [
        "environment",
        "state: start",
        "state: warm",
        "state: end",
    ]
    assert {r["reason"] for r in lost} == {"no attribute L2_cache_size"}
    assert format_table(values)


def test_the_environment_of_a_gpu_whose_torch_tells_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
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


def test_other_packages_attention_runs_last_and_may_lose_the_device(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def found(name: str, run: Any) -> Any:
        def find() -> Any:
            order.append(name)
            return run

        return find

    def wild(*_: Any) -> Any:
        raise DeviceLost("the device failed in wild: an illegal memory access")

    def others(case: Any, device: torch.device) -> dict[str, Any]:
        if case.operator != "attention":
            return {}
        return {"right": found("right", case.plain), "wild": found("wild", wild)}

    models = gpu_models.ModelBenchmark.run
    monkeypatch.setattr(operators, "third_party", others)
    monkeypatch.setattr(operators, "opponents", lambda case, device: {})
    monkeypatch.setattr(
        gpu_models.ModelBenchmark, "run", lambda *a: order.append("models") or models(*a)
    )
    code, values = measured(replace(plan, opposed=True), tmp_path / "gpu.json")
    assert order == ["models", "right", "wild"]
    assert code == 0 and values["complete"] is True and values["generate"][0]["status"] == "ok"
    lost = values["operators"][-1]
    assert lost["status"] == "skipped" and "illegal memory access" in lost["reason"]
    monkeypatch.setattr(
        operators, "third_party",
        lambda case, device: {k: v for k, v in others(case, device).items() if k == "right"},
    )  # fmt: skip
    code, values = measured(replace(plan, opposed=True, configs={}), tmp_path / "gpu.json")
    (row,) = (r for r in values["operators"] if r.get("opponent"))
    assert row["impl"] == "right" and row["ms"]["median"] > 0
    assert set(row["speedup_over"]) == {"reference"}
    ours = [r for r in values["operators"] if not r.get("opponent")]
    assert len(ours) == len(plan.cases)  # not recorded a second time


def test_backends_of_other_packages_are_contenders(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("auto", "eager", "compile", "lean", "onnxruntime", "theirs")
    monkeypatch.setattr(gpu_contenders, "known_backends", lambda: names)
    found = gpu_contenders.cuda_contenders()
    assert found[: len(gpu_contenders.CUDA_CONTENDERS)] == gpu_contenders.CUDA_CONTENDERS
    added = found[len(gpu_contenders.CUDA_CONTENDERS) :]
    assert [(c.name, c.backend, c.late) for c in added] == [
        ("onnxruntime bf16", "onnxruntime", True), ("theirs bf16", "theirs", True)]  # fmt: skip
    assert all(c.generates and c.meets(2, 2) and not c.meets(64, 2) for c in added)
    peers = {c.backend for c in found if c.factory is not None}
    assert peers == {"diffusers", "max-autotune"}


def test_diffusers_is_a_contender_in_its_own_numerics(plan: Plan, tmp_path: Path) -> None:
    (theirs,) = (c for c in gpu_contenders.CUDA_CONTENDERS if c.backend == "diffusers")
    plan = replace(plan, contenders=(EAGER, theirs), cases=[], batches=(2,))
    code, values = measured(plan, tmp_path / "gpu.json")
    row = {r["contender"]: r for r in values["forwards"]}["diffusers bf16"]
    assert code == 0
    if find_spec("diffusers") is None:
        assert row["status"] == "skipped" and "diffusers" in row["reason"]
        return
    assert row["status"] == "ok" and row["ms"]["median"] > 0
    assert 0 < row["error"] <= 4 * row["eager_bf16_error"]
    wrong = replace(theirs, numerics="official")  # another function: named, and not timed
    code, values = measured(replace(plan, contenders=(EAGER, wrong)), tmp_path / "gpu.json")
    row = {r["contender"]: r for r in values["forwards"]}["diffusers bf16"]
    assert code == 0 and row["status"] == "skipped" and "ms" not in row
    assert row["reason"].startswith("peer: error")


def test_the_autotuned_peer_is_compiled_in_that_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def compiled(function: Any, **options: Any) -> Any:
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    model = tiny_dit()
    backend = gpu_peers.MaxAutotuneBackend(model, "fp32", CPU)
    assert asked == [{"fullgraph": True, "dynamic": False, "mode": "max-autotune"}]
    labels, timesteps, x = torch.tensor([1, 2]), torch.tensor([999, 3]), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = model(x, timesteps[1].expand(2), labels)
        assert torch.equal(backend.prepare(labels, timesteps)(x, 1), expected)


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


def test_wrong_pixels_fail(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = Engine.generate

    def tinted(self: Engine, *labels: Any, **options: Any) -> Any:
        made = generate(self, *labels, **options)
        wrong = options["output"] == "np" and options["backend"] == "lean"
        return replace(made, images=made.images // 2) if wrong else made

    monkeypatch.setattr(Engine, "generate", tinted)
    code, values = measured(replace(plan, contenders=(EAGER, LEAN), cases=[]), tmp_path / "a.json")
    rows = {r["contender"]: r for r in values["pixels"]}
    assert code == 1 and rows["eager bf16"]["status"] == "ok"
    assert rows["lean bf16"]["reason"].startswith("pixels' rms error")
    assert "images_per_s" not in rows["lean bf16"]


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


def test_threads_may_record_and_read_at_once(tmp_path: Path) -> None:
    report = Report(tmp_path / "r.json")
    with ThreadPoolExecutor(8) as pool:
        for i in range(80):
            pool.submit(report.record, f"section {i % 20}", {"status": "ok", "i": i})
            pool.submit(report.snapshot)
    values = json.loads((tmp_path / "r.json").read_text())
    assert sorted(r["i"] for k, rows in values.items() if k != "complete" for r in rows) == [
        *range(80)
    ]
