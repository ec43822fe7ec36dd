"""The CPU run: what it measures, its ratios on made-up times, profile, memory, busy, processors."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close_to_reference

from dit_bench import cli, machine
from dit_bench.report import read
from dit_bench.speed import busy, cpu
from dit_bench.speed.busy import busy_rows, neighbours, working
from dit_bench.speed.forward import STEPS, Networks, Work
from dit_bench.speed.latency import Timer
from dit_bench.speed.memory import measure, needed_bytes, peak_of, resident_bytes
from dit_bench.speed.profile import linear_inputs, linears_alone, profile_row, shares
from dit_bench.subjects import random_model
from dit_engine.backends.lean.forward import LeanTransformer
from dit_engine.config import ModelConfig
from dit_engine.engine import Engine
from dit_engine.model import DiT
from dit_kernels.quantized import quantized_why_not

CPU = torch.device("cpu")
TINY = ModelConfig(depth=2, hidden_size=64, num_heads=1, patch_size=2, input_size=8,
                   num_classes=10, numerics="diffusers")  # fmt: skip
needs_proc = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc")


def timed(name: str, *ms: float, role: str = "peer", **more: Any) -> dict[str, Any]:
    return {"section": "forward", "case": "XL/2, batch 2", "model": "XL/2", "contender": name,
            "role": role, "status": "ok", "samples_ms": list(ms),
            "ms": {"median": sorted(ms)[len(ms) // 2]}} | more  # fmt: skip


def skipped(name: str, reason: str) -> dict[str, Any]:
    return {"case": "XL/2, batch 2", "contender": name, "status": "skipped", "reason": reason}


def test_ratios_are_taken_within_rounds_and_of_the_quickest_of_several() -> None:
    # The machine is twice as slow in the second half: the ratio is a half throughout.
    rows = [
        timed("lean bf16", 10, 10, 20, 20), timed("diffusers bf16", 20, 20, 40, 40),
        timed("compile bf16", 25, 25, 50, 50), timed("compile frozen bf16", 50, 50, 99, 99),
        timed("lean int8 start", 1, role="part"), skipped("lean int8", "no int8 here"),
    ]  # fmt: skip
    ratios = {(row["ours"], row["theirs"]): row for row in cpu.ratio_rows(rows)}
    row = ratios["lean bf16", "diffusers bf16"]
    assert row["ratio"] == {"p5": 0.5, "median": 0.5, "p95": 0.5}
    assert (row["goal"], row["result"]) == (0.5, "pass") and "conditioned" not in row
    row = ratios["lean bf16", "compile bf16"]
    assert row["ratio"]["median"] == pytest.approx(0.4) and row["result"] == "pass"
    assert ratios["lean int8", "diffusers bf16"]["reason"] == "lean int8: no int8 here"
    assert ratios["lean bf16", "openvino bf16"]["reason"] == "openvino bf16: not asked for"
    assert cpu.result(0.51, 0.5) == "miss"
    other = cpu.ratio_rows([timed("lean bf16", 1, model="S/2", case="S/2, batch 2")])
    assert all(row["goal"] is None for row in other)


def test_conditioning_is_spread_over_the_steps() -> None:
    rows = [timed("lean bf16", 100), timed("lean bf16 start", 300, role="part"),
            timed("diffusers bf16", 200), timed("openvino bf16", 200),
            timed("linears alone", 80, role="part")]  # fmt: skip
    cpu.add_conditioning(rows)
    assert rows[0]["conditioning_ms"] == 200 and "conditioning_ms" not in rows[2]
    row = cpu.ratio_row("c", rows, "lean bf16", "diffusers bf16", None)
    assert row["ratio"]["median"] == 0.5 and row["result"] == ""
    assert row["conditioned"] == pytest.approx((100 + 200 / STEPS) / 200)
    for theirs in ("openvino bf16", "linears alone"):  # they compute none
        assert "conditioned" not in cpu.ratio_row("c", rows, "lean bf16", theirs, None)


def test_what_a_run_measures_and_where_its_json_goes(tmp_path: Path) -> None:
    parser = cli.Parser("dit-bench cpu", "")
    cpu.add_arguments(parser)

    def planned(*options: str) -> list[tuple[Any, ...]]:
        found = cpu.plans(parser.parse_args(options))
        return [(*plan.models, plan.batches, *plan.kinds, plan.rounds) for plan in found]

    assert planned() == [
        ("XL/2", (2,), "forward", 15), ("S/2", (2, 16), "forward", 15),
        ("builtin", (2, 16), "forward", 15), ("S/8", (1,), "decode", 15),
    ]  # fmt: skip
    assert planned("--only", "vae", "memory", "--rounds", "4") == [("S/8", (1,), "decode", 4)]
    whole = cpu.destination(parser.parse_args([]))
    assert whole is not None and whole.parent.name == "results" and whole.name.startswith("cpu-")
    assert cpu.destination(parser.parse_args(["--profile"])) is None
    asked = tmp_path / "a.json"
    assert cpu.destination(parser.parse_args(["--json", str(asked)])) == asked


def test_the_cpu_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_ceilings: None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It waits for an idle machine, and then measures all the same, and says so."""
    waits: list[float] = []
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (1.5, 0.0, 0.0))
    monkeypatch.setattr(machine.time, "sleep", waits.append)
    monkeypatch.setattr(cpu, "PEERS", (("lean", "int8"), ("eager", "bf16")))
    monkeypatch.setattr(cpu, "model_of", lambda _: None)
    monkeypatch.setattr(cpu, "measure_memory", lambda *_: (_ for _ in ()).throw(ValueError("no")))
    monkeypatch.setattr(cpu, "BATCHES", {"builtin": (2,)})
    path = tmp_path / "cpu.json"
    options = ["--only", "builtin", "memory", "--rounds", "1", "--threads", "1"]
    assert cli.main(["cpu", *options, "--json", str(path)]) == 0
    assert sum(waits[:36]) == machine.SETTLE_S
    report = read(path, "cpu")
    assert report["machine"]["threads"] == 1 and report["load_average"] == 1.5
    rows = {row["contender"]: row for row in report["rows"] if row["section"] == "forward"}
    assert rows["lean bf16"]["role"] == "subject" and rows["lean bf16"]["conditioning_ms"] >= 0
    assert rows["linears alone"]["role"] == "part" and len(report["ratios"]) == 6
    assert report["rows"][-1]["section"] == "memory" and report["rows"][-1]["reason"] == "no"
    assert "linears alone" in capsys.readouterr().out


PARTS = {"qkv": 10.0, "attention": 6.0, "proj": 5.0, "fc1": 12.0, "fc1 + gelu": 14.0, "fc2": 12.0,
         "row kernels": 3.0, "final linear": 1.0}  # fmt: skip


def test_shares_sum_to_the_forward() -> None:
    found = {row["part"]: (row["ms"], row["share"]) for row in shares(PARTS, 80.0)}
    assert found["linears"] == (40.0, 0.5)
    assert found["gelu"] == (2.0, 0.025)
    assert found["rest"] == (29.0, pytest.approx(0.3625))


@torch.inference_mode()
@pytest.mark.parametrize("quantized", [None, "int8"])
def test_every_part_of_the_profile_runs(quantized: str | None) -> None:
    if quantized and (reason := quantized_why_not(quantized, CPU)):
        pytest.skip(reason)
    model = random_model(TINY)
    lean = LeanTransformer(model, torch.float32, CPU, quantized)
    if quantized is None:
        last, (_, wide, rows) = model.final_layer.linear, linear_inputs(lean, 2)
        expected = F.linear(rows.double(), last.weight.double(), last.bias.double())
        assert_close_to_reference(linears_alone(lean, 2)(), expected, tolerance=1e-5)
        block = model.blocks[1].mlp.fc2  # pyright: ignore
        expected = F.linear(wide.double(), block.weight.double(), block.bias.double())
        assert_close_to_reference(lean.blocks[1].fc2(wide), expected, tolerance=1e-5)
    row = profile_row(linears_alone(lean, 2), lean, 2, "fp32", Timer(CPU, 1, 1.0))
    assert set(row["operators_ms"]) == set(PARTS) and row["ms"]["n"] == 1


def test_needed_bytes() -> None:
    config = ModelConfig.named("S/2", num_classes=7)
    needed = needed_bytes(config, 4, torch.bfloat16)
    with torch.device("meta"):
        state = DiT(config).state_dict().values()
    assert needed["weights"] == 2 * sum(tensor.numel() for tensor in state)
    rows = sum(t.shape[0] for n, t in DiT(TINY).state_dict().items() if n.endswith("n.1.weight"))
    assert needed_bytes(TINY, 4, torch.float32)["modulations"] == 4 * STEPS * 3 * rows
    assert needed["activations"] == 4 * 256 * (3 + 4) * 384 * 2


@needs_proc
def test_a_passing_allocation_is_seen() -> None:
    before, size = resident_bytes(), 256 * 2**20
    length, peak = peak_of(lambda: len(torch.ones(size, dtype=torch.uint8)))
    assert length == size  # what else is freed meanwhile is less than a quarter
    assert all(0.75 * size < peak[key] - before[key] < 1.25 * size for key in before)


@needs_proc
@pytest.mark.slow
def test_memory_is_measured_in_a_child() -> None:
    measured = measure(random_model(TINY), 1)
    assert measured["needed"] == needed_bytes(TINY, 2, torch.bfloat16)
    # Such a small model vanishes among the pages that any run touches.
    assert abs(measured["after_load"]["total"]) < 64 * 2**20


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_neighbours_work_inside_the_block_alone_and_end_with_it() -> None:
    with neighbours(2) as programs:
        pids = [program.pid for program in programs]
        end = time.monotonic() + 10  # on a busy machine they wait for their turn
        with working(programs):
            while min(map(processor_seconds, pids)) < 0.12 and time.monotonic() < end:
                time.sleep(0.05)
        worked = [processor_seconds(pid) for pid in pids]
        time.sleep(0.3)
        assert [processor_seconds(pid) for pid in pids] == pytest.approx(worked, abs=0.02)
        assert min(worked) > 0.1
        programs[0].kill()
        programs[0].wait()
        with pytest.raises(RuntimeError, match="ended before"), working(programs):
            pass
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    # It ends with the program that started it, however that ends.
    subprocess.run([sys.executable, "-c", busy._NEIGHBOUR, "1"], check=True, timeout=60)
    (row,) = busy_rows("c", {"sleep": lambda: time.sleep(0.01)}, 2, 1, visit_ms=30)
    assert row["neighbours"] == 1 and min(row["idle_ms"], row["busy_ms"]) >= 10
    assert row["ratio"]["median"] == pytest.approx(row["busy_ms"] / row["idle_ms"], rel=0.5)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("AMD EPYC", " (family 25, model 17)"),
        ("AMD EPYC 9654 96-Core", ""),
        ("Xeon(R) CPU @ 2.20GHz", " (family 25, model 17)"),
    ],
)
def test_the_processor_is_named_with_what_tells_its_generation(name: str, more: str) -> None:
    one = (f"processor : 0\ncpu family : 25\nmodel : 17\nmodel name : {name}\n"
           "flags : fpu avx2 avx512_bf16 amx_tile sse2\n")  # fmt: skip
    found = machine.processor(f"{one}\n{one.replace(name, 'another')}")
    assert found == name + more
    assert machine.same_processor(found, name) and machine.same_processor(found, found)
    assert machine.same_processor(f"{name} (family 25, model 17: Zen 4)", found)
    assert not machine.same_processor(found, f"{name} (family 1, model 1)") or found == name
    assert machine.instruction_sets(one) == ["avx2", "avx512_bf16", "amx_tile"]


def test_other_names_of_processors() -> None:
    assert machine.processor("processor : 0\nCPU part : 0xd40\n").endswith("(part 0xd40)")
    assert machine.processor("") == machine.cpu_model("") and machine.instruction_sets("") == []
    assert machine.slug("Intel(R) Xeon(R) 8481C CPU @ 2.70GHz") == "intel-xeon-8481c-cpu"


def test_a_wrong_forward_is_neither_profiled_nor_timed_beside_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(random_model(ModelConfig(1, 64, 1, 2, 8, num_classes=10)), device="cpu")
    monkeypatch.setattr(cpu, "works", lambda *_: iter([("tiny", Work(Networks(engine), 2))]))
    monkeypatch.setattr(cpu, "busy_rows", lambda case, functions, *_: [
        {"contender": name, "neighbours": 1} for name in functions
    ])  # fmt: skip
    right = Work.forward

    def wrong(self: Work, name: str, precision: str) -> Any:
        run = right(self, name, precision)
        return (lambda: run() * 1.1) if name == "lean" else run

    monkeypatch.setattr(Work, "forward", wrong)
    report: dict[str, Any] = {"rows": []}
    cpu.fill_profile(["tiny"], report, Timer(CPU, 1, 1.0))
    assert report["rows"][0]["status"] == "wrong" and "ms" not in report["rows"][0]
    report["rows"].clear()
    cpu.fill_busy(["tiny"], report, Timer(CPU, 1, 1.0), 1)
    found = {row["contender"]: row for row in report["rows"]}
    subject = found["lean bf16"]
    assert (subject["status"], subject["role"]) == ("wrong", "subject")
    assert "neighbours" not in subject
