"""The CPU benchmark's arithmetic on made-up times, its table, its arguments."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_bench import cpu, hardware
from dit_bench.cpu_forward import STEPS, random_model
from dit_bench.cpu_memory import Sampler, needed_bytes, resident_bytes
from dit_bench.cpu_report import (
    FORWARD,
    WIDTH,
    Comparison,
    format_table,
    forward_comparisons,
    instruction_sets,
    make_row,
    memory_row,
    slug,
    verdict,
)
from dit_bench.cpu_timing import interleave_visits
from dit_bench.peers import Built
from dit_bench.timing import Interleaved
from dit_engine.config import ModelConfig
from dit_engine.model import DiT

TINY = ModelConfig(depth=2, hidden_size=64, num_heads=1, patch_size=2, input_size=8,
                   num_classes=10, numerics="diffusers")  # fmt: skip


class Clock:
    """Time passes only while a function of this clock runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def function(self, name: str, *ms: float) -> Callable[[], None]:
        """Takes ``ms`` in turn, the last of them from then on."""
        turn = count()

        def run() -> None:
            self.calls.append(name)
            self.now += ms[min(next(turn), len(ms) - 1)] / 1e3

        return run

    def __call__(self) -> float:
        return self.now


def test_a_visit_leaves_out_its_first_call_unless_that_fills_it() -> None:
    clock = Clock()
    functions = {"long": clock.function("long", 500, 400), "short": clock.function("short", 90, 4)}
    times = interleave_visits(functions, 2, visit_ms=100, pause_s=0, clock=clock)
    assert times.samples_ms["long"] == pytest.approx([500, 400])
    assert times.samples_ms["short"] == pytest.approx([4, 4])
    assert clock.calls.count("long") == 2
    assert clock.calls.count("short") == 1 + 3 + 25  # 90 + 3 · 4 ≥ 100; 25 · 4 ≥ 100


def test_every_round_visits_everyone_in_some_order() -> None:
    clock = Clock()
    functions = {name: clock.function(name, 100) for name in "abcd"}
    interleave_visits(functions, 8, visit_ms=10, pause_s=0, clock=clock)
    rounds = [clock.calls[i : i + 4] for i in range(0, 32, 4)]
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert len({tuple(names) for names in rounds}) > 3


@pytest.mark.parametrize("rounds", [0, -1])
def test_at_least_one_round(rounds: int) -> None:
    with pytest.raises(ValueError, match=f"rounds {rounds} is not a positive integer"):
        interleave_visits({}, rounds)


def timed(**samples: list[float]) -> tuple[Built, Interleaved]:
    """As `build_peers` and timing leave them; "lean_bf16" stands for "lean bf16"."""
    named = {name.replace("_", " "): values for name, values in samples.items()}
    functions = dict.fromkeys(named, lambda: None)
    records = {name: {} if name.endswith("start") else {"error": 0.01} for name in named}
    return Built(functions, records), Interleaved(named)


def test_ratios_are_taken_within_rounds() -> None:
    # The machine is twice as slow in the second half: the ratio is a half throughout.
    built, times = timed(lean_bf16=[10, 10, 20, 20], diffusers_bf16=[20, 20, 40, 40])
    row = make_row("w", Comparison("lean bf16", "diffusers bf16", 0.5), built, times)
    assert row["ratio"] == {"low": 0.5, "median": 0.5, "high": 0.5}
    assert (row["ours_ms"], row["theirs_ms"]) == (15, 30)
    assert row["result"] == "pass"
    assert "conditioned" not in row
    built, times = timed(a=[1, 2, 3], b=[1, 1, 1])
    ratio = make_row("w", Comparison("a", "b"), built, times)["ratio"]
    assert ratio == {"low": pytest.approx(1.2), "median": 2, "high": pytest.approx(2.8)}


def test_the_quickest_of_several_modes_is_meant() -> None:
    built, times = timed(lean_bf16=[10.0], compile_bf16_default=[25.0], compile_bf16_slow=[50.0])
    row = make_row("w", Comparison("lean bf16", "compile bf16", 0.3), built, times)
    assert row["theirs"] == "compile bf16 default"
    assert row["ratio"]["median"] == pytest.approx(0.4)
    assert row["result"] == "miss"


def test_conditioning_is_spread_over_the_steps() -> None:
    built, times = timed(lean_bf16=[100.0], lean_bf16_start=[300.0], diffusers_bf16=[200.0])
    row = make_row("w", Comparison("lean bf16", "diffusers bf16"), built, times)
    assert row["ratio"]["median"] == 0.5
    assert row["conditioned"] == pytest.approx((100 + 200 / STEPS) / 200)
    assert row["result"] == ""


def test_no_conditioning_against_linears() -> None:
    built, times = timed(lean_bf16=[100.0], lean_bf16_start=[300.0], linears_alone=[80.0])
    built.records["linears alone"] = {}
    row = make_row("w", Comparison("lean bf16", "linears alone", 1.25), built, times)
    assert "conditioned" not in row and row["result"] == "pass"


def test_a_row_says_why_it_is_missing() -> None:
    built, times = timed(lean_bf16=[100.0], lean_int8_start=[1.0])
    built.records |= {
        "compile bf16 default": {"skipped": "no compiler"},
        "compile bf16 max-autotune": {"skipped": "computes another function"},
        "lean int8": {"skipped": "no int8 here"},
    }
    row = make_row("w", Comparison("lean bf16", "compile bf16", 0.53), built, times)
    assert row["skipped"] == "compile bf16: no compiler; computes another function"
    assert row["result"] == "skipped"
    row = make_row("w", Comparison("lean int8", "lean bf16"), built, times)
    assert row["skipped"] == "lean int8: no int8 here"
    row = make_row("w", Comparison("lean bf16", "openvino bf16"), built, times)
    assert row["skipped"] == "openvino bf16: not asked for"


def test_verdicts() -> None:
    assert [verdict(v, 0.5) for v in (0.49, 0.5, 0.51, math.nan, None)] == [
        "pass", "pass", "miss", "miss", "skipped",
    ]  # fmt: skip
    assert verdict(3.0, None) == ""


def test_bars_belong_to_one_workload() -> None:
    bars = {(c.ours, c.theirs): c.bar for c in forward_comparisons(with_bars=True)}
    assert bars["lean bf16", "openvino bf16"] == 0.66
    assert bars["lean int8", "diffusers bf16"] == 0.33
    assert len(bars) == len(FORWARD) == 6
    assert all(c.bar is None for c in forward_comparisons(with_bars=False))


MEMORY = {
    "needed": {"weights": 900 * 2**20, "modulations": 60 * 2**20, "activations": 40 * 2**20},
    "baseline": {"total": 300 * 2**20, "anonymous": 200 * 2**20},
    "peak_while_loading": {"total": 2000 * 2**20, "anonymous": 1000 * 2**20},
    "after_load": {"total": 1000 * 2**20, "anonymous": 990 * 2**20},
    "peak_while_running": {"total": 1100 * 2**20, "anonymous": 1090 * 2**20},
    "ratio": 1.1,
}


def test_table() -> None:
    built, times = timed(lean_bf16=[10.0, 11.0], diffusers_bf16=[20.0, 22.0])
    built.records["openvino bf16"] = {"skipped": "No module named 'openvino'"}
    rows = [
        make_row("DiT", Comparison("lean bf16", "diffusers bf16", 0.4), built, times),
        make_row("DiT", Comparison("lean bf16", "openvino bf16", 0.66), built, times),
        memory_row("memory", MEMORY, with_bar=True),
        memory_row("memory", "no /proc", with_bar=False),
    ]
    head, names, diffusers, openvino, _, memory_head, _, memory, no_memory = format_table(
        rows
    ).splitlines()[1:]
    assert (head, memory_head) == ("DiT", "memory")
    assert "at most" in names and "theirs ms" in names
    assert diffusers.split()[:5] == ["lean", "bf16", "÷", "diffusers", "bf16"]
    assert diffusers.split()[5:] == ["0.40", "0.500", "0.500-0.500", "10.50", "21.00", "miss"]
    assert openvino.endswith("0.66 skipped: openvino bf16: No module named 'openvino'")
    assert "1.15" in memory and "1.100" in memory and memory.endswith("needed 1000  pass")
    assert "1000 after load, 1100 at most in a step, 1090 of it no mapped file" in memory
    assert no_memory.endswith("skipped: no /proc")
    assert json.loads(json.dumps(rows)) == rows


def test_processor_names() -> None:
    assert slug("AMD EPYC 9B14") == "amd-epyc-9b14"
    assert slug("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz") == "intel-xeon-platinum-8481c-cpu"
    assert slug(" ") == "unknown"


def test_instruction_sets() -> None:
    text = "model name : X\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile sse2\nflags : avx2\n"
    assert instruction_sets(text) == ["avx2", "avx512f", "avx512_bf16", "amx_tile"]
    assert instruction_sets("") == []


def test_needed_bytes_are_those_of_the_module() -> None:
    config = ModelConfig.named("S/2", num_classes=7)
    needed = needed_bytes(config, 4, torch.bfloat16)
    with torch.device("meta"):
        state = DiT(config).state_dict().values()
    assert needed["weights"] == 2 * sum(tensor.numel() for tensor in state)
    rows = sum(t.shape[0] for n, t in DiT(TINY).state_dict().items() if n.endswith("n.1.weight"))
    assert needed_bytes(TINY, 4, torch.float32)["modulations"] == 4 * STEPS * 3 * rows
    assert needed["activations"] == 4 * 256 * (3 + 4) * 384 * 2


def test_resident_bytes() -> None:
    text = "Name:\tpython\nVmRSS:\t    2048 kB\nRssAnon:\t    1024 kB\n"
    assert resident_bytes(text) == {"total": 2 * 2**20, "anonymous": 2**20}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_sampler_sees_a_passing_allocation() -> None:
    before = resident_bytes()["anonymous"]
    with Sampler() as sampler:
        block = torch.ones(256 * 2**20, dtype=torch.uint8)
        deadline = seen(sampler, before + 192 * 2**20)  # what else is freed meanwhile is less
        del block
    assert deadline, "256 MiB were not seen"
    assert sampler.peak["anonymous"] >= before + 192 * 2**20


def seen(sampler: Sampler, level: int) -> bool:
    """Whether the sampler sees ``level`` bytes within 5 s."""
    import time

    end = time.monotonic() + 5
    while sampler.peak["anonymous"] < level and time.monotonic() < end:
        time.sleep(0.005)
    return sampler.peak["anonymous"] >= level


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_memory_is_measured_in_a_child() -> None:
    from dit_bench.cpu_memory import measure

    model = random_model(TINY)
    measured = measure(model, 2, "bf16", 1)
    assert measured["needed"] == needed_bytes(TINY, 2, torch.bfloat16)
    # Such a small model vanishes among the pages that any run touches.
    assert abs(measured["after_load"]["total"]) < 64 * 2**20


def arguments(*options: str) -> Any:
    return cpu.build_parser().parse_args(options)


def test_json_goes_among_the_results_after_a_whole_run_only(tmp_path: Path) -> None:
    whole = cpu.destination(arguments())
    assert whole is not None and whole.parent.name == "results" and whole.name.startswith("cpu-")
    for options in (["--quick"], ["--only", "vae"], ["--profile"]):
        assert cpu.destination(arguments(*options)) is None
    asked = tmp_path / "a.json"
    assert cpu.destination(arguments("--quick", "--json", str(asked))) == asked


def test_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(kind: str) -> Callable[..., dict[str, Any]]:
        def run(*values: Any) -> dict[str, Any]:
            *what, settings, _ = values
            return {"did": (kind, *what), "settings": settings}

        return run

    for kind in ("forward", "decode", "memory", "profile"):
        monkeypatch.setattr(cpu, f"run_{kind}", record(kind))

    def planned(*options: str) -> list[tuple[Any, ...]]:
        return [job()["did"] for job in cpu.plan(arguments(*options), print)]

    assert planned() == [
        ("forward", "XL/2", 2), ("forward", "S/2", 2), ("forward", "S/2", 16),
        ("forward", "builtin", 2), ("forward", "builtin", 16), ("decode",), ("memory", "XL/2"),
    ]  # fmt: skip
    assert planned("--quick") == [("forward", "S/2", 2)]
    assert planned("--only", "vae", "builtin") == [
        ("forward", "builtin", 2), ("forward", "builtin", 16), ("decode",),
    ]  # fmt: skip
    monkeypatch.setattr(cpu, "quantized_why_not", lambda *_: None)
    assert planned("--profile") == [("profile", "XL/2", "bf16"), ("profile", "XL/2", "int8")]
    monkeypatch.setattr(cpu, "quantized_why_not", lambda *_: "no VNNI")
    assert planned("--profile", "--only", "S/2") == [("profile", "S/2", "bf16")]
    [job] = cpu.plan(arguments("--quick", "--rounds", "4", "--threads", "1"), print)
    settings = job()["settings"]
    assert (settings.rounds, settings.threads, settings.compile_modes) == (4, 1, ("default",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "'0' is not a positive integer"),
        (["--rounds", "many"], "'many' is not a positive integer"),
        (["--threads", "-1"], "'-1' is not a positive integer"),
        (["--only", "L/2"], "invalid choice: 'L/2'"),
        (["--quack"], "unrecognized arguments: --quack"),
    ],
)
def test_bad_arguments(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cpu.main(options)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "100000"], "threads 100000 is above the"),
        (["--profile", "--only", "vae"], "--profile vae: choose one of XL/2, S/2, builtin"),
        (["--quick", "--json", "/no/such/folder/x.json"], "the directory /no/such/folder does not"),
    ],
)
def test_options_that_cannot_be(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cpu.main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_waits_until_the_load_is_an_idle_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = [2.0]
    monkeypatch.setattr(hardware.os, "getloadavg", lambda: (loads[-1], 0.0, 0.0))
    monkeypatch.setattr(hardware.time, "sleep", lambda s: loads.append(loads[-1] / 2))
    told: list[str] = []
    hardware.settle(told.append)
    assert loads == [2.0, 1.0, 0.5] and len(told) == 1
    hardware.settle(told.append)
    assert len(loads) == 3 and len(told) == 1


def test_report_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, times = timed(lean_bf16=[10.0], diffusers_bf16=[20.0])
    row = make_row("DiT-S/2", Comparison("lean bf16", "diffusers bf16"), built, times)
    job = {"rows": [row], "workload": "DiT-S/2"}
    monkeypatch.setattr(cpu, "plan", lambda *_: [lambda: job])
    monkeypatch.setattr(hardware.os, "getloadavg", lambda: (1.5, 0.0, 0.0))
    waits: list[float] = []
    monkeypatch.setattr(hardware.time, "sleep", waits.append)
    before = torch.get_num_threads()
    path = tmp_path / "cpu.json"
    try:
        assert cpu.main(["--json", str(path), "--threads", "1"]) == 0
    finally:
        torch.set_num_threads(before)
    assert sum(waits) == hardware.SETTLE_S  # and then it measures all the same, and says so
    report = json.loads(path.read_text())
    assert report["sections"] == [job]
    assert report["hardware"]["torch_threads"] == 1
    assert report["versions"]["torch"] == torch.__version__
    text = cpu.format_report(report)
    assert "lean bf16 ÷ diffusers bf16" in text
    assert "busy (load average 1.50 at the start)" in text
    assert "busy" not in cpu.format_report({**report, "load_average": 0.0})


# /proc/cpuinfo's name, vendor, family, model and stepping, as published for these machines → ours.
PROCESSORS = [
    ("AMD EPYC", "AuthenticAMD", 25, 17, 1, "AMD EPYC (family 25, model 17: Zen 4)"),
    ("AMD EPYC", "AuthenticAMD", 23, 49, 0, "AMD EPYC (family 23, model 49: Zen 2)"),
    ("AMD EPYC", "AuthenticAMD", 25, 1, 1, "AMD EPYC (family 25, model 1: Zen 3)"),
    ("AMD EPYC", "AuthenticAMD", 26, 2, 1, "AMD EPYC (family 26, model 2: Zen 5)"),
    ("AMD EPYC", "AuthenticAMD", 99, 1, 1, "AMD EPYC (family 99, model 1)"),
    ("AMD EPYC 9654 96-Core", "AuthenticAMD", 25, 17, 1, "AMD EPYC 9654 96-Core"),
    ("Intel(R) Xeon(R) Processor @ 2.20GHz", "GenuineIntel", 6, 143, 8,
        "Intel(R) Xeon(R) Processor @ 2.20GHz (family 6, model 143: Sapphire Rapids)"),
    ("Intel(R) Xeon(R) CPU @ 2.20GHz", "GenuineIntel", 6, 85, 7,
        "Intel(R) Xeon(R) CPU @ 2.20GHz (family 6, model 85: Cascade Lake)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "vendor", "family", "model", "stepping", "expected"), PROCESSORS)
def test_the_processor_is_named_with_its_generation(
    name: str, vendor: str, family: int, model: int, stepping: int, expected: str
) -> None:
    one = f"""processor	: 0
vendor_id	: {vendor}
cpu family	: {family}
model		: {model}
model name	: {name}
stepping	: {stepping}
"""
    found = hardware.processor(f"{one}\n{one.replace(name, 'another')}")
    assert found == expected
    assert hardware.same_processor(found, name) and hardware.same_processor(found, found)
    assert not hardware.same_processor(found, f"{name} (family 1, model 1)") or found == name


def test_a_processor_of_arm() -> None:
    text = "processor	: 0\nCPU implementer	: 0x41\nCPU part	: 0xd40\n"
    assert hardware.processor(text).endswith("(part 0xd40: Neoverse V1)")
    assert hardware.processor("") == hardware.cpu_model("")
    assert hardware.describe_hardware()["cpu"] == hardware.processor()


def test_the_cpu_table_has_a_narrow_form() -> None:
    row = {"workload": "S/2, batch 2", "ours": "lean bf16", "theirs": "openvino bf16", "bar": 0.66,
           "ratio": {"low": 0.5, "median": 0.613, "high": 0.7}, "ours_ms": 12.5, "theirs_ms": 20.4,
           "result": "pass"}  # fmt: skip
    skipped = {"workload": "S/2, batch 2", "ours": "lean int8", "theirs": "x", "bar": None,
               "skipped": "no int8"}  # fmt: skip
    assert format_table([row, skipped], short=True).splitlines()[1:] == [
        "S/2, batch 2",
        "  lean bf16 ÷ openvino bf16: 0.613, at most 0.66: pass",
        "  lean int8 ÷ x: skipped: no int8",
    ]
    assert max(map(len, format_table([row]).splitlines())) <= WIDTH
