"""The GPU run on a CPU that passes for CUDA, and what is told of a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dit_bench import cli, machine
from dit_bench.ceilings import Ceilings
from dit_bench.report import read
from dit_bench.speed import gpu, models, operators
from dit_bench.speed.forward import Work
from dit_bench.speed.operator_cases import cases_of
from dit_bench.subjects import random_model
from dit_bench.timing import Budget
from dit_engine.config import ModelConfig

CPU = torch.device("cpu")
TINY = ModelConfig(depth=1, hidden_size=64, num_heads=1, patch_size=2, input_size=8,
                   num_classes=10, numerics="diffusers")  # fmt: skip


def test_a_gpu_whose_torch_and_driver_tell_little(monkeypatch: pytest.MonkeyPatch) -> None:
    few = SimpleNamespace(name="G", total_memory=3, uuid="GPU-12")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: few)
    commands: list[list[str]] = []

    def answer(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(stdout="570.1, 1980, 3201, 412.51, [N/A], 55\n")

    monkeypatch.setattr(subprocess, "run", answer)
    found = machine.describe_cuda(torch.device("cuda"))
    assert (found["compute_capability"], found["driver_version"]) == ("9.0", "570.1")
    assert (found["memory_bytes"], found["l2_bytes"], found["clocks.sm"]) == (3, None, "1980")
    assert commands[0][-1] == "--id=GPU-12"  # not by number: torch may see other devices
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    assert machine.describe_cuda(torch.device("cuda"))["driver_version"] is None


@pytest.fixture
def as_gpu(monkeypatch: pytest.MonkeyPatch, small_ceilings: None, tmp_path: Path) -> Any:
    """Rows of ``dit-bench gpu`` as it is, but for sizes, on a CPU that passes for CUDA."""
    subject = SimpleNamespace(
        name="S/8", weights="random", model=random_model(TINY), vae=None,
        label_names=None, size=16,
    )  # fmt: skip
    compiler = torch.compile  # what is traced, without Inductor's half of a minute
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend="eager", **how))
    monkeypatch.setattr(gpu, "cuda_device", lambda: CPU)
    monkeypatch.setattr(gpu, "all_cases", lambda _: cases_of(2, 5, 64, 2)[:1])
    monkeypatch.setattr(gpu, "MANY", 4)
    monkeypatch.setattr(gpu, "ROUNDS", 2)
    monkeypatch.setattr(gpu, "PEERS", gpu.PEERS[:4])
    monkeypatch.setattr(gpu, "LATE_PEERS", ())
    monkeypatch.setattr("dit_bench.speed.operators.opponents", lambda *_: {})
    for module in (models, gpu):
        monkeypatch.setattr(module, "load_subject", lambda *_, **__: subject)

    def run(*options: str, code: int = 0) -> list[dict[str, Any]]:
        path = tmp_path / "gpu.json"
        assert cli.main(["gpu", "--json", str(path), "--sizes", "S/8", *options]) == code
        report = read(path, "gpu")
        assert report["complete"] and not (tmp_path / "gpu.json.partial").exists()
        return report["rows"]

    return run


def test_a_gpu_run_from_end_to_end(as_gpu: Any) -> None:
    found = {(row["section"], row.get("images"), row["contender"]): row for row in as_gpu()}
    for images in (2, 4):
        for name in ("lean bf16", "eager bf16", "diffusers bf16"):
            assert found["forward", images, name]["ms"]["median"] > 0
        assert found["step", images, "lean bf16"]["status"] == "ok"
        assert found["forward", images, "graph bf16"]["reason"] == "CUDA graphs need a CUDA device"
        assert found["image", images // 2, "lean bf16"]["status"] == "ok"
    assert found["operator", None, "native"]["rate"] > 0


def test_a_gpu_check_times_nothing(as_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = as_gpu("--check")
    assert not any("ms" in row for row in rows)
    by_name = {(row["case"], row["contender"]): row["status"] for row in rows}
    assert by_name["forward of S/8", "lean bf16"] == "ok"
    assert by_name["bits of an image, alone and in a batch", "lean bf16"] == "ok"
    assert sum(row["section"] == "operator" for row in rows) == 1
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    wrong = [row["reason"] for row in as_gpu("--check", code=1) if row["status"] == "wrong"]
    assert wrong == ["bits differ"] * 2


def test_attention_of_other_packages_is_compared_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them is right, the other is not installed; our own rows are not made twice."""

    def right(packed: torch.Tensor) -> torch.Tensor:
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        return (
            torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()
        )

    module: Any = ModuleType("flash_attn")
    module.flash_attn_qkvpacked_func = right
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    cases = [case for case in cases_of(2, 5, 64, 2) if case.operator == "attention"]
    report: dict[str, Any] = {"rows": []}
    operators.measure_third_party(cases, report, CPU, Ceilings(1.0, {}, 1, 1))
    two, four = report["rows"]
    assert two["contender"] == "flash-attn" and two["speedup_over"]["native"] > 0
    assert two["error_over_reference"] < 20
    assert (four["contender"], four["status"]) == ("flash-attn-4", "skipped")


def test_what_breaks_loses_its_part_alone(as_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts without a reference, or whose timing breaks, have failed; the others are measured."""
    step, timed = Work.guided_step, operators.interleave

    def no_step(self: Work, name: str, precision: str) -> Any:
        if name == "eager":
            raise RuntimeError("CUDA out of memory")
        return step(self, name, precision)

    def no_timing(functions: Any, *arguments: Any, **options: Any) -> Any:
        if "native" in functions:
            raise RuntimeError("an illegal memory access")
        return timed(functions, *arguments, **options)

    monkeypatch.setattr(Work, "guided_step", no_step)
    monkeypatch.setattr(operators, "interleave", no_timing)
    rows = as_gpu(code=1)
    lost = [(r["section"], r["reason"]) for r in rows if r["status"] == "failed"]
    said = ("step", "RuntimeError: CUDA out of memory")
    assert lost == [said, said, ("operator", "RuntimeError: an illegal memory access")]
    assert sum(r["section"] == "image" and r["status"] == "ok" for r in rows) == 4


def test_each_part_has_its_share_of_what_is_left(
    as_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the parts before it took: the operators do not take the decoder's time."""
    now, left = [0.0], list[float]()

    def model(plan: Any, name: str, report: Any, timer: Any, keep: Any) -> None:
        left.append(round(timer.budget.left(), 6))
        now[0] += timer.budget.left()

    def cases(*arguments: Any, **_: Any) -> None:
        left.append(round(arguments[3].left(), 6))
        now[0] += arguments[3].left()

    monkeypatch.setattr(gpu, "Budget", lambda _: Budget(100, clock=lambda: now[0]))
    monkeypatch.setattr(models, "_measure_model", model)
    monkeypatch.setattr(operators, "measure", cases)
    as_gpu()
    assert left == [40, 30, 18, 7.2, 4.8]


def test_without_time_everything_is_skipped(as_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "Budget", lambda _: Budget(0))
    rows = as_gpu()
    assert {row["reason"] for row in rows} == {"no time was left"}
    assert {"forward", "step", "image", "operator"} <= {row["section"] for row in rows}


def test_the_gpu_command_refuses_what_it_cannot_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "gpu.json"
    assert cli.main(["gpu", "--json", str(path)]) == 2
    assert capsys.readouterr().err.startswith("error: no CUDA device: ") and not path.exists()
    monkeypatch.setattr(gpu, "cuda_device", lambda: CPU)
    for options, said in ((["--sizes", "M/2"], "model 'M/2' is unknown"),
                          (["--minutes", "0.1"], "minutes 0.1 is not above 0.5")):  # fmt: skip
        assert cli.main(["gpu", *options]) == 2
        assert said in capsys.readouterr().err


HANGS = """
import sys, time, torch
from dit_bench import cli
from dit_bench.speed import gpu
gpu.cuda_device = lambda: torch.device("cpu")
gpu.START_SECONDS = gpu.RESERVE_SECONDS = 0.0
gpu.measure = lambda *_: time.sleep(120)
cli.main(["gpu", "--minutes", "0.01", "--json", sys.argv[1]])
"""


@pytest.mark.slow
def test_a_run_that_hangs_ends_and_says_where(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HANGS, str(tmp_path / "gpu.json")],
                          capture_output=True, text=True, timeout=100)  # fmt: skip
    assert done.returncode == 1 and "Timeout" in done.stderr and "gpu.py" in done.stderr
