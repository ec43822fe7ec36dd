"""The GPU benchmark's course on a CPU: what it measures in which order, records, and skips."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_runs import CPU, LEAN, measured
from tiny import tiny_dit, tiny_vae

from dit_bench import (
    ceilings,
    gpu,
    gpu_contenders,
    gpu_models,
    hardware,
    operator_cases,
    operators,
)
from dit_bench.budget import Budget
from dit_bench.ceilings import NAMES, Ceilings
from dit_bench.gpu import Plan
from dit_bench.gpu_contenders import EAGER, Contender
from dit_bench.gpu_report import Report
from dit_bench.gpu_table import format_table
from dit_bench.operator_checks import DeviceLost
from dit_engine import backends
from dit_engine.backends.eager import EagerBackend
from dit_engine.config import ModelConfig
from dit_engine.errors import BackendUnavailable
from dit_kernels import quantized

ABSENT = {"absent": "its package is not installed", "remote": "an address is needed"}
SECTIONS = list(gpu.SHARES)


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
from dit_engine.console.run import run_command
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
    monkeypatch.setattr(gpu, "cuda_device", lambda: CPU)
    assert gpu.main(["--sizes", "M/2"]) == 2
    assert "model 'M/2' is unknown" in capsys.readouterr().err
    assert gpu.main(["--minutes", "0.1"]) == 2
    assert "minutes 0.1 is not above 0.5" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert operators.main(["--device", "cpu", "--only", "softmax"]) == 2
    assert "--only 'softmax' is part of no operator's name" in capsys.readouterr().err


class Stream:
    def __init__(self, device: torch.device) -> None: ...


class Replayed:
    """A CUDA graph on a CPU: what was captured is computed again."""

    def __init__(self, work: Callable[[], torch.Tensor], _: object) -> None:
        self.work, self.result = work, work()

    def replay(self) -> None:
        self.result.copy_(self.work())

    def __iter__(self) -> Iterator[Any]:
        return iter((self, self.result))


@pytest.fixture
def small_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -m dit_bench.gpu`` as it is, but for sizes, on a CPU that passes for CUDA."""
    found = operators.implementations
    cases = dict.fromkeys(("S", "B", "L", "XL"), (1, 32, 2))
    full = gpu.cuda_plan

    def small(device: torch.device, configs: Any) -> Plan:
        return replace(
            full(torch.device("cuda"), configs), device=device, rounds=1, vae=tiny_vae().config,
            decoded_side=4, ceilings={"size": 16, "copy_mib": 1, "rounds": 2},
        )  # fmt: skip

    monkeypatch.setattr(gpu, "cuda_device", lambda: CPU)
    monkeypatch.setattr(gpu, "cuda_plan", small)
    monkeypatch.setattr(ModelConfig, "named", lambda name: tiny_dit(depth=1).config)
    monkeypatch.setattr(operator_cases, "FAMILIES", cases)
    monkeypatch.setattr(operator_cases, "TOKENS", 4)
    monkeypatch.setattr(gpu_models, "STEPS", 2)
    monkeypatch.setattr(
        operator_cases, "vae_cases",
        lambda dtype, n, timed: [operator_cases._groupnorm(n, 32, 4, dtype, timed=timed)] * 2,
    )  # fmt: skip
    monkeypatch.setattr(
        operators, "implementations", lambda case, device, _: found(case, device, ("reference",))
    )
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # it has its own tests
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(gpu_contenders, "capture_graph", Replayed)
    monkeypatch.setattr(
        gpu_contenders, "known_backends", lambda: ("auto", "eager", "compile", "lean", "absent")
    )
    monkeypatch.setitem(backends._FACTORIES, "absent", (__name__, "AbsentBackend"))


@pytest.mark.usefixtures("small_command")
def test_the_command_measures_everything_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    assert gpu.main(["--minutes", "20", "--sizes", "XL/2", "S/2", "--json", str(path)]) == 0
    values = json.loads(path.read_text())
    assert [(r["section"], r["status"]) for r in values["sections"]] == [
        (name, "ok") for name in SECTIONS
    ]
    plan = gpu.cuda_plan(CPU, {})
    contenders = gpu_contenders.cuda_contenders()
    expected = {
        (model, c.name, batch)
        for model in ("XL/2", "S/2") for c in contenders for batch in plan.batches
        if c.meets(batch, 2)
    }  # fmt: skip
    assert {c.backend for c in contenders} == {
        "eager", "lean", "diffusers", "compile", "compile blocks", "max-autotune", "absent"
    }  # fmt: skip
    seen = [(r["model"], r["contender"], r["batch"]) for r in values["forwards"]]
    assert len(seen) == len(expected) and set(seen) == expected
    assert seen[0][::2] == ("XL/2", 64)
    measured_first = seen[: seen.index(("XL/2", "eager bf16", 1))]
    assert {(m, b) for m, _, b in measured_first} == {("XL/2", 64), ("XL/2", 2)}
    made = [(r["model"], r["contender"], r["batch"]) for r in values["generate"]]
    assert len(made) == len(set(made)) == 2 * 3 * sum(c.generates for c in contenders)
    pixels = [(r["model"], r["contender"]) for r in values["pixels"]]
    assert len(pixels) == len(set(pixels)) == 2 * sum(c.generates for c in contenders)
    cases = [(r["operator"], r["shape"], r["dtype"]) for r in values["operators"]]
    assert {(c.operator, c.shape, NAMES[c.dtype]) for c in plan.cases} == set(cases)
    timed = [c.timed for c in plan.cases]
    assert timed == sorted(timed, reverse=True)  # ragged ones last
    assert {n for c in plan.cases[:4] for n in c.shape.split()[:1]} == {"N=64", "N=2"}
    assert list(values).index("forwards") < list(values).index("operators")
    rows = [r for name in ("forwards", "generate", "pixels", "operators", "decode")
            for r in values[name]]  # fmt: skip
    reasons = {r["reason"] for r in rows if r["status"] == "skipped"}
    assert {r["status"] for r in rows} == {"ok", "skipped"}
    allowed = "fp8|its package is not installed|No module named|on CUDA|flash"
    assert all(re.search(allowed, reason) for reason in reasons), reasons
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == f"written: {path}" and len(shown) <= 61
    assert any(line.startswith("XL/2  lean bf16") for line in shown)


def test_no_reference_is_computed_for_a_peer_that_is_not_installed(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []

    class Counted(gpu_models.Inputs):
        def __init__(self, engine: Any, batch: int) -> None:
            computed.append(engine.config.numerics)
            super().__init__(engine, batch)

    def missing(*_: Any) -> Any:
        raise ImportError("No module named 'diffusers'")

    monkeypatch.setattr(gpu_models, "Inputs", Counted)
    monkeypatch.setattr(gpu.DecodeBenchmark, "run", lambda _: None)
    theirs = Contender("theirs bf16", "theirs", "bf16", factory=missing, numerics="diffusers")
    _, values = measured(replace(plan, contenders=(EAGER, theirs)), tmp_path / "gpu.json")
    rows = [r for r in values["forwards"] if r["contender"] == "theirs bf16"]
    assert [r["reason"] for r in rows] == ["No module named 'diffusers'"] * 2
    assert set(computed) == {"official"}

    targets: list[Any] = []
    monkeypatch.setattr(operators, "Target", lambda *_: targets.append(1) or 1 / 0)
    monkeypatch.setattr(operators, "third_party", lambda *_: {"flash": missing})
    report = Report(None)
    benchmark = operators.OperatorBenchmark(report, CPU, Budget(9), Ceilings(1.0, {}, 1, 1))
    benchmark.run_third_party(plan.cases[:1])
    (row,) = report.values["operators"]
    assert row["impl"] == "flash" and row["status"] == "skipped" and not targets


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
    broken = {r["section"]: r["reason"] for r in values["sections"] if r["status"] == "failed"}
    assert broken == dict.fromkeys(("operators", "ragged operators"), "TypeError: a mistake")
    assert [r["section"] for r in values["sections"]] == SECTIONS
    monkeypatch.setattr(operators.OperatorBenchmark, "run", raising(DeviceLost("illegal access")))
    code, values = measured(plan, tmp_path / "b.json")
    assert code == 1 and "decode" not in values and values["complete"] is False
    assert values["generate"][0]["status"] == "ok"  # of the first model
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
    assert order == ["models", "models", "models", "right", "wild"]
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
