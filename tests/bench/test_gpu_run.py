"""The GPU benchmark's course on a CPU: what it measures in which order, records, and skips."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_runs import LEAN, measured

from dit_bench import gpu, gpu_models, hardware, operators
from dit_bench.ceilings import Ceilings
from dit_bench.gpu import Plan
from dit_bench.gpu_contenders import EAGER, Contender
from dit_bench.gpu_table import format_table
from dit_bench.operator_checks import DeviceLost
from dit_engine import backends
from dit_engine.backends.eager import EagerBackend
from dit_engine.errors import BackendUnavailable

ABSENT = {"absent": "its package is not installed", "remote": "an address is needed"}
SECTIONS = ["ceilings", "operators", "decode", "models", "other packages' attention"]


class AbsentBackend(EagerBackend):
    def __init__(self, *_: Any) -> None:
        raise BackendUnavailable(ABSENT["absent"])


class RemoteBackend(EagerBackend):
    def __init__(self, *_: Any) -> None:
        raise ValueError(ABSENT["remote"])


def test_without_cuda_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "gpu.json"
    assert gpu.main(["--json", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: no CUDA device: ")
    assert not path.exists()


BARE = """
import sys, warnings
packages = "safetensors", "PIL", "tqdm", "huggingface_hub", "diffusers", "openvino", "onnx", "rich"
sys.modules.update(dict.fromkeys(packages))  # not to be had
import torch
from dit_bench import gpu
from dit_bench.gpu_inputs import random_model
from dit_engine.cli.errors import run_command
from dit_engine.config import ModelConfig
from dit_engine.engine import Engine

def command():
    warnings.warn("of some library")
    model = random_model(ModelConfig(1, 64, 1, 2, 8, num_classes=4), torch.device("cpu"))
    made = Engine(model, device="cpu").generate(1, steps=1, sampler="ddim", output="latent").images
    return gpu.main(["--minutes", "0"]) if made.isfinite().all() else 1

sys.exit(run_command(command))
"""


def test_torch_and_numpy_are_all_that_it_needs() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, timeout=100)  # fmt: skip
    note, error = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert note == "note: of some library" and error.startswith("error: no CUDA device: ")


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
    assert [p.name for p in tmp_path.glob("b.json*")] == ["b.json.partial"]


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


def test_waiting_for_an_idle_machine_counts_as_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the minutes at most; what is printed then says that the machine was busy."""
    slept: list[float] = []
    monkeypatch.setattr(hardware, "load_average", lambda: 3.0)
    monkeypatch.setattr(operators, "load_average", lambda: 3.0)
    monkeypatch.setattr(hardware.time, "sleep", slept.append)
    monkeypatch.setattr(operators, "measure_ceilings", lambda _: Ceilings(1.0, {}, 1, 1, {}))
    monkeypatch.setattr(operators.OperatorBenchmark, "run", lambda *_: None)
    monkeypatch.setattr(operators.OperatorBenchmark, "run_third_party", lambda *_: None)
    options = ["--device", "cpu", "--json", str(tmp_path / "a.json")]
    for minutes, most in (("0.4", 12.0), ("10", 180.0)):
        slept.clear()
        assert operators.main([*options, "--minutes", minutes]) == 0
        assert sum(slept) == pytest.approx(most, abs=0.1)
        shown = capsys.readouterr().out
        assert f"{most:.0f} s at most" in shown and "busy (load average 3.00" in shown
    assert operators.main([*options, "--minutes", "0"]) == 2
