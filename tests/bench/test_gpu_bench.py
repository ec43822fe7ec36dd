"""The GPU run on a CPU that passes for CUDA, and what is told of a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import made_up
import pytest
import torch
from triton_workers import require_triton

from dit_bench import cli, machine, peers
from dit_bench.ceilings import measure_ceilings
from dit_bench.progress import Progress
from dit_bench.report import read, validate
from dit_bench.show.reports import report_tables
from dit_bench.speed import gpu, gpu_check, gpu_parts, latency, models, operators
from dit_bench.speed.forward import Work
from dit_bench.speed.latency import Timer
from dit_bench.speed.operator_cases import cases_of
from dit_bench.subjects import random_model, random_vae
from dit_bench.timing import Budget, interleave
from dit_engine.config import ModelConfig
from dit_engine.engine import Engine
from dit_engine.vae import VAEConfig
from dit_kernels.chooser import VARIABLE, choosing

CPU = torch.device("cpu")
TINY = ModelConfig(depth=1, hidden_size=64, num_heads=1, patch_size=2, input_size=8,
                   num_classes=10, numerics="diffusers")  # fmt: skip


def test_a_gpu_whose_torch_and_driver_report_few_facts(monkeypatch: pytest.MonkeyPatch) -> None:
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


TESTS = """
import pytest
pytestmark = pytest.mark.gpu
def test_right(): pass
@pytest.mark.parametrize("case", ["a b"])
def test_wrong(case): assert 1 == 2, "one is not two"
"""


class Nvml(ModuleType):
    """NVML of a GPU that gets warmer and is throttled by its power cap."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0
    asked = 0

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-12"
        return "handle"

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return 1980

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 650_000  # milliwatts

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        self.asked += 1
        return 40 + self.asked

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return 0b101  # idle; power cap


@pytest.fixture
def as_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Rows of ``dit-bench gpu`` as it is, but for sizes, on a CPU that passes for CUDA."""
    vae = random_vae(VAEConfig(block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8))
    subject = SimpleNamespace(
        name="S/8", weights="random", model=random_model(TINY), vae=vae, label_names=None, size=16,
    )  # fmt: skip
    compiler = torch.compile  # what is traced, without Inductor's half of a minute
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend="eager", **how))
    monkeypatch.setattr(gpu, "cuda_device", lambda: CPU)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(uuid="12"))
    monkeypatch.setitem(sys.modules, "pynvml", Nvml("pynvml"))
    cases = {case.operator: case for case in cases_of(2, 5, 64, 2)}
    few = [cases[name] for name in ("attention", "layernorm_modulate")]
    ragged = cases_of(3, 7, 64, 2)[:1]
    for module in (gpu, gpu_check):
        monkeypatch.setattr(module, "all_cases", lambda _: few)
        monkeypatch.setattr(module, "ragged_cases", lambda: ragged)
    compiled = {"section": "check", "case": "compiled", "contender": "triton", "status": "ok"}
    monkeypatch.setattr(gpu, "compile_kernels", lambda _, calls: compiled | {
        "remark": f"{len([call() for call in calls])} calls"})  # fmt: skip
    monkeypatch.setattr(gpu_check, "PRECISIONS", ("bf16", "fp32"))  # fp8 is for CUDA
    monkeypatch.setattr(gpu_check, "random_vae", lambda _: vae)
    monkeypatch.setattr(gpu_check, "random_model", lambda _: subject.model)
    monkeypatch.setenv(VARIABLE, "1")  # and as it was, afterwards
    monkeypatch.setattr(gpu, "MANY", 4)
    monkeypatch.setattr(gpu, "ROUNDS", 2)
    monkeypatch.setattr(gpu, "CEILING_SECONDS", 0.01)
    small = partial(measure_ceilings, size=32, copy_mib=1)
    monkeypatch.setattr(gpu, "measure_ceilings", small)
    monkeypatch.setattr(latency, "interleave", partial(interleave, visit_ms=0, pause_s=0))
    monkeypatch.setattr(peers, "graphed", lambda forward, _: forward)
    monkeypatch.setattr(gpu_check, "ROWS", (2,))
    monkeypatch.setattr(gpu_check, "IMAGES", 2)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr("dit_bench.speed.operators.opponents", lambda *_: {})
    for module in (models, gpu_check):
        monkeypatch.setattr(module, "load_subject", lambda *_, **__: subject)
    (tmp_path / "tests/unit").mkdir(parents=True)
    (tmp_path / "tests/unit/test_gpu.py").write_text(TESTS)

    def run(*options: str, code: int = 0) -> list[dict[str, Any]]:
        path = tmp_path / "gpu.json"
        assert cli.main(["gpu", "--json", str(path), "--sizes", "S/8", "S/8", *options]) == code
        report = read(path, "gpu")
        assert report["complete"] and not (tmp_path / "gpu.json.partial").exists()
        first, *rows = report["rows"]
        assert first["case"] == "compiled" and int(first["remark"].split()[0]) >= 8
        return rows

    return run


@pytest.mark.slow
def test_a_gpu_run_from_end_to_end(as_gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = as_gpu()
    found = {(row["section"], row.get("images"), row["contender"]): row for row in rows}
    for images in (2, 4):
        for name in ("lean bf16", "eager bf16", "graph bf16", "autotuned blocks graph bf16"):
            assert found["forward", images, name]["ms"]["median"] > 0
        step = found["step", images // 2, "lean bf16"]
        assert step["status"] == "ok" and found["step", images // 2, "lean fp8"]["reason"]
        row = found["kernels", images // 2, "lean bf16"]
        assert 0 < len(row["shares"]) <= 20 <= row["launches"]
        assert sum(part["share"] for part in row["shares"]) <= 1 + 1e-9
        assert row["shares"] == sorted(row["shares"], key=lambda part: -part["ms"])
    for images in (1, 2, 8):
        assert found["image", images, "lean bf16"]["status"] == "ok"
    for name in ("lean bf16", "eager bf16", "compile vae bf16"):
        assert found["decode", 8, name]["status"] == "ok"
    operators = [row for row in rows if row["section"] == "operator"]
    assert len(operators) == 3 and all(row["rate"] > 0 for row in operators)
    state = found["image", 8, "lean bf16"]["device_state"]
    assert state["sm_mhz"] == {"min": 1980, "median": 1980, "max": 1980}
    assert state["power_w"]["max"] == 650 and state["throttled"] == ["power cap"]
    before = found["image", 1, "lean bf16"]["device_state"]
    assert state["celsius"]["min"] > before["celsius"]["max"]  # each part has its own samples
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 60 and "slowed by power cap" in shown


def test_a_gpu_check_times_nothing(
    as_gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = as_gpu("--check", code=1)  # one of the GPU's tests fails
    assert not any("ms" in row for row in rows)
    status = {(row["case"], row["contender"]): row["status"] for row in rows}
    assert status["forward of S/8, 2 rows", "lean bf16"] == "ok"
    assert status["forward of S/8, 2 rows", "graph bf16"] == "ok"
    same = next(row for row in rows if row["case"].startswith("images alone"))
    assert same["remark"] == "alone: same bits, in another order: same bits"
    assert sum(row["section"] == "operator" for row in rows) == 2
    tests = {row["contender"]: row for row in rows if row["case"] == "tests on the GPU"}
    assert tests.pop("pytest")["remark"] == "1 passed, 1 failed"
    ((name, row),) = tests.items()
    assert name.endswith("::test_wrong[a b]") and "one is not two" in row["reason"]
    shown = capsys.readouterr()
    assert "one is not two" in shown.out.strip().splitlines()[-1]
    assert "one is not two" in shown.err  # as soon as it was known


def test_images_that_depend_on_their_batch_by_more_than_rounding_are_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generate = gpu_check.Engine.generate

    off: dict[str, float] = {}

    def worse(self: Any, labels: Any, **options: Any) -> Any:
        made = generate(self, labels, **options)
        factor = 1 + off[options["precision"]] * (len(labels) == 1)
        return replace(made, images=made.images * factor)

    monkeypatch.setattr(gpu_check.Engine, "generate", worse)
    engine = Engine(random_model(TINY), device=CPU)
    for float32, bfloat16, expected in ((1e-4, 0.1, "ok"), (1e-2, 0.9, "wrong")):
        off |= {"fp32": float32, "bf16": bfloat16}
        for precision in off:
            row = gpu_check.image_row(engine, precision)
            assert row["status"] == expected, row
            assert "alone: off by" in row["remark"] and "order: same bits" in row["remark"]


@pytest.mark.slow
def test_hung_tests_are_stopped(as_gpu: Any, tmp_path: Path) -> None:
    hangs = "import time\ndef test_later(): time.sleep(99)\n"
    (tmp_path / "tests/unit/test_gpu.py").write_text(TESTS + hangs)
    tests = gpu_check.GpuTests
    tests.start()
    *_, row = tests.rows(Timer(CPU, 1, 1, budget=Budget(6 + gpu_check.SUMMARY_SECONDS)))
    assert row["status"] == "late" and "1 passed, 1 failed" in row["reason"]
    assert tests.process is None
    (tmp_path / "tests/unit/test_gpu.py").unlink()
    tests.start()
    (row,) = tests.rows(Timer(CPU, 1, 1, budget=Budget(6)))
    assert (row["status"], row["reason"]) == ("skipped", f"no tests in {tmp_path}")


LOSES_ITS_DEVICE = """
import pytest, torch
pytestmark = pytest.mark.gpu
lost = []
torch.cuda.is_available = lambda: True
def synchronize():
    if lost:
        raise RuntimeError("CUDA error")
torch.cuda.synchronize = synchronize
@pytest.mark.parametrize("n", range(9))
def test_a(n):
    if n == 2 or lost:
        lost.append(n)
        raise RuntimeError("an illegal memory access")
"""


@pytest.mark.slow
def test_a_worker_that_loses_its_device_is_replaced(
    as_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The hook in tests/conftest.py ends it before its next test."""
    (tmp_path / "tests/unit/test_gpu.py").write_text(LOSES_ITS_DEVICE)
    ours = Path(__file__).parents[1]
    (tmp_path / "tests/conftest.py").write_text(
        f"import runpy, sys\nsys.path += {[str(Path(p).resolve()) for p in sys.path]!r}\n"
        f"found = runpy.run_path({str(ours / 'conftest.py')!r})\n"
        "pytest_runtest_setup = found['pytest_runtest_setup']\n"
    )
    monkeypatch.setattr(gpu_check, "CORES", 1)
    gpu_check.GpuTests.start()
    first, crashed, rest = gpu_check.GpuTests.rows(Timer(CPU, 1, 1, budget=Budget(100)))
    assert "an illegal memory access" in first["reason"] and "[2]" in first["contender"]
    assert "crashed while running" in crashed["reason"] and "[3]" in crashed["contender"]
    assert rest["remark"] == "7 passed, 2 failed"


def few_parts(monkeypatch: pytest.MonkeyPatch, *wanted: int) -> None:
    """Keep only the first part of each of these groups."""
    whole = gpu.groups
    monkeypatch.setattr(gpu, "groups", lambda *given: [
        (share, parts[:1]) for i, (share, parts) in enumerate(whole(*given)) if i in wanted
    ])  # fmt: skip


def test_an_error_loses_only_the_rows_of_its_part(
    as_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
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

    def no_kernels(*_: Any) -> Any:
        raise RuntimeError("no CUPTI")

    monkeypatch.setattr(Work, "guided_step", no_step)
    monkeypatch.setattr(operators, "interleave", no_timing)
    monkeypatch.setattr(gpu, "kernel_row", no_kernels)
    few_parts(monkeypatch, 0, 2, 4, 5)
    rows = as_gpu(code=1)
    broken = [row for row in rows if row["status"] == "failed"]
    assert all(re.search(r" \(test_gpu_bench.py:\d+, .*\)$", row["reason"]) for row in broken)
    lost = [(row["section"], row["reason"].partition(" (")[0]) for row in broken]
    assert lost == [("step", "RuntimeError: CUDA out of memory"),
                    ("operator", "RuntimeError: an illegal memory access"),
                    ("check", "RuntimeError: no CUPTI")]  # fmt: skip
    assert sum(row["section"] == "image" and row["status"] == "ok" for row in rows) == 2


@pytest.mark.slow
def test_after_a_lost_device_the_program_restarts_without_finished_parts(
    as_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first operator fails as after an illegal memory access."""
    measure, commands = operators.measure, list[list[str]]()
    lost = False

    def illegal(*arguments: Any, **options: Any) -> None:
        nonlocal lost
        lost = not commands
        measure(*arguments, **options)

    device = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(device, True)

    def execute(program: str, command: list[str]) -> None:
        assert program == sys.executable == command[0]
        assert not os.get_inheritable(device) and os.get_inheritable(2)
        commands.append(command)
        raise SystemExit

    few_parts(monkeypatch, 0, 2, 3, 8)
    monkeypatch.setattr(operators, "measure", illegal)
    monkeypatch.setattr(gpu_parts, "usable", lambda _: not lost)
    monkeypatch.setattr(os, "execv", execute)
    with pytest.raises(SystemExit):
        as_gpu()
    os.close(device)
    (command,) = commands
    assert command[1:4] == ["-m", "dit_bench", "gpu"]
    assert 0 < float(command[command.index("--minutes") + 1]) < 9
    before = read(tmp_path / "gpu.json.partial", "gpu")
    again: list[str] = []
    monkeypatch.setattr(Progress, "stage", lambda self, name: again.append(name))
    rows = as_gpu(*command[command.index("--minutes") :])
    assert rows[: len(before["rows"]) - 1] == before["rows"][1:]
    assert before["parts_done"] and not set(before["parts_done"]) & set(again)
    assert sum(row["section"] == "operator" for row in rows) == 3


def test_a_part_that_loses_the_device_is_run_again_without_candidates(
    as_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[dict[str, Any]] = []

    def execute(program: str, command: list[str]) -> None:
        left.append(read(Path(command[-1]), "gpu"))
        assert not choosing()

    def part(timer: Timer) -> None:
        for module in ("torch/a.py", "dit_kernels/chooser.py"):
            said = f"128x192 is not used for qkv: an illegal access of {module}"
            warnings.warn_explicit(said, UserWarning, f"/x/{module}", 1)

    monkeypatch.setattr(os, "execv", execute)
    monkeypatch.setattr(gpu_parts, "usable", lambda _: len(left) > 1)
    monkeypatch.setattr(gpu, "groups", lambda *_: [(0.5, [("a", part), ("b", part)])])
    as_gpu()
    assert [report["parts_done"] for report in left] == [[], ["b"]]  # b has no choices any more
    row = left[0]["rows"][1]
    assert (row["case"], row["contender"], row["status"]) == ("a", "a warning", "skipped")
    assert row["reason"].endswith("an illegal access of dit_kernels/chooser.py")


def test_after_a_hung_part_the_program_restarts_without_it(
    as_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    left: list[dict[str, Any]] = []

    def execute(program: str, command: list[str]) -> None:
        assert not choosing()
        left.append(read(Path(command[-1]), "gpu"))

    def hang(timer: Timer) -> None:
        until = time.monotonic() + 30
        while not left and time.monotonic() < until:
            time.sleep(0.01)

    monkeypatch.setattr(os, "execv", execute)
    monkeypatch.setattr(gpu_parts, "PART_SECONDS", 0.1)
    monkeypatch.setattr(gpu_parts, "PART_SHARE", 0.0)
    monkeypatch.setattr(gpu, "groups", lambda *_: [(0.5, [("a", hang)]), (0.5, [])])
    as_gpu(code=1)
    (report,) = left
    assert report["parts_done"] == ["a"]
    assert re.search(r"did not end in 0 s \(gpu_parts.py:\d+ a, ", report["rows"][-1]["reason"])
    assert [(row["case"], row["status"]) for row in report["rows"][1:]] == [("a", "failed")]


def test_each_group_gets_its_share_of_the_remaining_time(
    as_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that exceeds the time of its group does not use up all the remaining time."""
    now, left = [0.0], list[float]()

    def spend(timer: Timer) -> None:
        assert timer.budget is not None
        left.append(round(timer.budget.left(), 6))
        now[0] += timer.budget.left() * 1.5

    monkeypatch.setattr(gpu, "Budget", lambda _: Budget(100, clock=lambda: now[0]))
    parts = [("a", spend), ("b", spend)]
    monkeypatch.setattr(gpu, "groups", lambda *_: [(0.5, parts), (0.8, [("c", spend)])])
    (row,) = as_gpu()
    assert left == [50, 20] and row["reason"] == "no time was left"  # of b


def test_the_tables_of_a_whole_run_fit_on_a_page(tmp_path: Path) -> None:
    """On the terminal and in a document. Failures come last."""
    found = made_up.gpu()
    validate(found)
    shown = "\n".join(table.text() for table in report_tables(found)).splitlines()
    assert len(shown) < 60
    assert max(map(len, shown)) < 220
    assert shown[-1] == "  and 2 other reasons in the JSON"
    assert shown[-2].startswith("attention N=11   triton   failed: CompilationError: at 11: source")
    assert shown[-2].endswith("(rows.py:11, launch.py:1); 1 more: attention N=12 triton")
    assert "SM 1500–1980 MHz, 80–700 W, 35–61 °C, slowed by power cap" in "\n".join(shown)
    (line,) = (line for line in shown if line.startswith("XL/2: one guided step"))
    assert "32: 40 (81%), 1: 1.25 (81%) 32: 80 (81%), 1: 2.5 (81%)" in " ".join(line.split())
    (line,) = (line for line in shown if line.startswith("linear T=256 D=3 "))
    assert line.count("1 triton 128x64, 50%; compile 1") == 2
    (tmp_path / "gpu.json").write_text(json.dumps(found))
    (tmp_path / "page.md").write_text("<!-- gpu -->\n<!-- /gpu -->\n")
    assert cli.main(["documents", *(str(tmp_path / name) for name in ("gpu.json", "page.md"))]) == 0
    page = (tmp_path / "page.md").read_text()
    assert "| XL/2: one guided step | 32: 40 (81%), 1: 1.25 (81%) | 32: 80 (81%)" in page
    assert "Measured on NVIDIA H200" in page


@pytest.mark.slow
def test_without_time_everything_is_skipped(as_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "Budget", lambda _: Budget(0))
    rows = as_gpu()
    assert {row["reason"] for row in rows} == {"no time was left"}
    cases = " ".join(row["case"] for row in rows)
    assert all(part in cases for part in ("forward", "step", "image", "decode", "attention"))


def test_the_gpu_command_refuses_what_it_cannot_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "gpu.json"
    assert cli.main(["gpu", "--json", str(path)]) == 2
    assert capsys.readouterr().err.startswith("error: no CUDA device: ") and not path.exists()
    monkeypatch.setattr(gpu, "cuda_device", lambda: CPU)
    for options, said in ((["--sizes", "M/2"], "model 'M/2' is unknown"),
                          (["--minutes", "0.1"], "minutes 0.1 is not above 0.416667")):  # fmt: skip
        assert cli.main(["gpu", *options]) == 2
        assert said in capsys.readouterr().err


HANGS = """
import ctypes, sys, time, torch
from dit_bench import cli
from dit_bench.speed import gpu
gpu.cuda_device = lambda: torch.device("cpu")
gpu.START_SECONDS, gpu.RESERVE_SECONDS, gpu.LAST_SECONDS = 0.0, 4.0, 3.0
hang = ctypes.PyDLL(None).sleep if sys.argv[2] == "with the lock" else time.sleep
gpu.sustained_ceilings = lambda _, report: report["rows"].append(
    {"section": "check", "case": "a part", "contender": "b", "status": "wrong", "reason": "c"})
gpu.compile_kernels = lambda *_: hang(120)
cli.main(["gpu", "--minutes", "0.08", "--json", sys.argv[1]])
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["waits", "with the lock"])
def test_a_run_that_hangs_ends_and_says_where(tmp_path: Path, how: str) -> None:
    """It also shows and writes its results so far, unless the hung call holds Python's lock."""
    path = tmp_path / "gpu.json"
    done = subprocess.run([sys.executable, "-c", HANGS, str(path), how],
                          capture_output=True, text=True, timeout=100)  # fmt: skip
    assert done.returncode == 1 and "gpu.py" in done.stderr
    if how == "waits":
        report = read(path, "gpu")
        assert not report["complete"] and [row["case"] for row in report["rows"]] == ["a part"]
        assert "INTERRUPTED (it did not end in time)" in done.stdout and "a part" in done.stdout
    else:
        assert "Timeout" in done.stderr


def test_failures_are_found_without_the_summary_of_pytest() -> None:
    lines = ["[gw1] [  5%] PASSED tests/a.py::b", "[gw0] [ 10%] FAILED tests/a.py::c[x - y] ",
             "ERROR    root:a.py:3 a message - of a log"]  # fmt: skip
    counts, failures = gpu_check.outcomes("\n".join(lines))
    assert counts == {"PASSED": 1, "FAILED": 1}
    assert failures == {"tests/a.py::c[x - y]": "no reason was told"}
    _, failures = gpu_check.outcomes("\n".join([*lines, "FAILED tests/a.py::c[x - y] - a - b"]))
    assert failures == {"tests/a.py::c[x - y]": "a - b"}


def test_every_call_that_is_compiled_beforehand_runs(
    as_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ModelConfig(depth=3, hidden_size=64, num_heads=1, patch_size=2, input_size=8)
    vae = random_vae(VAEConfig(block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8))
    monkeypatch.setattr(gpu_check, "random_vae", lambda _: vae)
    monkeypatch.setattr(ModelConfig, "named", lambda *_: small)
    called: list[Any] = []
    ways = {"broken": None, "library": lambda *given, **_: called.append(given)}
    monkeypatch.setattr(gpu_check.choices, "candidates", lambda *_: {"proj": ways, "fc1": ways})
    monkeypatch.setattr(gpu_check, "PRECISIONS", ("bf16", "fp32"))  # fp8 is for CUDA
    for call in (*gpu_check.operator_calls(CPU), *gpu_check.model_calls(CPU, ["S/8"])):
        call()
    assert len(called) == 2 * 2 * len(gpu_check.ROWS)


COMPILES = """
import sys
from types import SimpleNamespace
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit
from dit_kernels.triton.compiling import only_compiling
from dit_kernels.triton.layernorm_modulate import layernorm_modulate
from dit_kernels.triton.product import ProductTiles, product
loaded = []
driver.set_active(SimpleNamespace(  # of a Hopper GPU that is not there
    get_current_device=lambda: 0, get_current_stream=lambda device: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32), launcher_cls=lambda *_: "launcher",
    utils=SimpleNamespace(
        get_device_properties=lambda _: {"max_shared_mem": 232448},
        load_binary=lambda name, *_: loaded.append(name) or ("module", "function", 1, 0, 1024))))
x = torch.zeros(2, 256, 1152, dtype=torch.bfloat16)
w = torch.zeros(1152, 1152, dtype=torch.bfloat16)
def launches():
    layernorm_modulate(x, w[:2], w[2:4], 1e-6)
    product(x.flatten(0, 1), w, w[0], ProductTiles(128, 128, 64, 4, 3))
compiled, launch = [], jit.JITFunction.run
knobs.compilation.listener = lambda **told: compiled.append(told["cache_hit"])
with only_compiling(2, torch.device("cpu")) as kernels:
    launches()
    launches()
    product(x.flatten(0, 1), w, w[0], ProductTiles(128, 100, 64, 4, 3))  # cannot be compiled
assert jit.JITFunction.run is launch
print([kernel.name for kernel in kernels], sorted(loaded), compiled)
before = len(compiled)
jit.JITFunction.run = lambda self, *given, **o: launch(self, *given, **o | {"warmup": True})
launches()
assert len(compiled) == before, "a launch compiles again"
"""


@pytest.mark.slow
def test_kernels_are_compiled_beforehand_and_found_in_the_cache(tmp_path: Path) -> None:
    require_triton()
    for cached in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", COMPILES], capture_output=True, text=True, timeout=100,
            env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        names = ["_layernorm_modulate_kernel", "_product_kernel"]
        assert done.stdout.strip() == f"{names} {names} {[cached, cached]}"
