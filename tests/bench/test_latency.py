"""Rows, verdicts and shares on made-up times; who takes part in which work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_engine

from dit_bench.ceilings import Ceilings
from dit_bench.contenders import Contender
from dit_bench.cost import Cost, decoder_record, model_record
from dit_bench.speed import latency, models
from dit_bench.speed.forward import Networks, Work
from dit_bench.speed.generation import GenerationCheck
from dit_bench.speed.latency import NOISE_BOUND, Timer, noisy, shares, verdict
from dit_bench.speed.models import contenders
from dit_bench.timing import Spread

CEILINGS = Ceilings(10.0, {"fp32": 0.1, "bf16": 1.0}, 1024, 256, {})
OWN = {"contender": "lean", "noisy": False}


@pytest.mark.parametrize(
    ("ratios", "more", "expected"),
    [
        ((1.5, 2.0, 2.5), {}, "lean is 2.00× as quick"),
        ((0.4, 0.5, 0.6), {}, "eager is 2.00× as quick"),
        ((0.9, 2.0, 2.5), {}, "no difference shown"),
        ((1.5, 2.0, 2.5), {"noisy": True}, "noisy: no verdict"),
        ((1.5, 2.0, 2.5), {"role": "other network"}, "another network"),
    ],
)
def test_a_verdict_needs_ratios_on_one_side_and_quiet_times(
    ratios: tuple[float, ...], more: dict[str, Any], expected: str
) -> None:
    spread = dict(zip(("p5", "median", "p95"), ratios, strict=True))
    row = {"contender": "eager", "role": "peer", "noisy": False, "ratio": spread} | more
    assert verdict(row, OWN) == expected


def test_noise_is_a_wide_spread_or_too_few_samples() -> None:
    half = NOISE_BOUND / 2
    assert not noisy(Spread(1 - 0.99 * half, 1, 1 + 0.99 * half, 5))
    assert noisy(Spread(1 - 1.01 * half, 1, 1 + 1.01 * half, 5)) and noisy(Spread(1, 1, 1, 4))


def test_shares_of_the_ceilings_in_closed_form() -> None:
    row = {"tflop_s": 0.25, "precision": "bf16", "flops_per_byte": 50.0}
    found = shares(row, CEILINGS)
    assert found["percent_of_matmul"] == pytest.approx(25)
    assert found["percent_of_copy"] == pytest.approx(50)  # 0.25e12 / 50 bytes a second: 5 GB/s
    assert found["bound_by"] == "memory"  # the ridge lies at 100 FLOPs a byte
    assert shares(row | {"flops_per_byte": 200.0}, CEILINGS)["bound_by"] == "arithmetic"
    assert shares({"tflop_s": 1.0, "precision": "int8"}, CEILINGS) == {}


def test_rows_of_timed_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up times; one contender is wrong, one cannot run."""
    samples = {"lean": [10.0, 10.0, 20.0], "eager": [30.0, 30.0, 60.0]}
    monkeypatch.setattr(latency, "interleave", lambda functions, *_, **__: {
        name: samples[name] for name in functions})  # fmt: skip
    expected = torch.ones(4)

    def missing() -> Any:
        raise ImportError("no such package")

    def giving(value: float) -> Any:
        return lambda: lambda: expected * value

    work = {"section": "forward", "case": "S/2, batch 2", "model": "S/2", "images": 2}
    lean, eager, broken, absent = Timer(torch.device("cpu"), 3, 1.0, CEILINGS).run(work, [
        Contender("lean", "subject", "fp32", giving(1.0), flops=10**9, weight_bytes=10**7),
        Contender("eager", "peer", "fp32", giving(1 + 1e-6), flops=10**9),
        Contender("broken", "peer", "fp32", giving(1.1)),
        Contender("absent", "peer", "fp32", missing),
    ], expected)  # fmt: skip
    assert lean["ms"]["median"] == 10 and lean["noisy"] and lean["images_s"] == 200
    assert lean["tflop_s"] == pytest.approx(0.1)
    assert lean["percent_of_matmul"] == pytest.approx(100)
    assert eager["ratio"] == {"p5": 3, "median": 3, "p95": 3}  # within each round
    assert eager["verdict"] == "noisy: no verdict" and "ratio" not in lean
    assert broken["status"] == "wrong" and broken["error"] == pytest.approx(0.1)
    assert "ms" not in broken
    assert (absent["status"], absent["reason"]) == ("skipped", "no such package")


@pytest.mark.parametrize(
    ("kind", "names", "flops"),
    [
        ("forward", ["lean int8", "eager bf16", "lean bf16", "LDM-4 U-Net bf16", "diffusers bf16"],
         lambda forward, _: 3 * forward),
        ("step", ["lean int8", "eager bf16", "lean bf16"], lambda forward, _: 6 * forward),
        ("decode", ["lean bf16", "eager bf16", "diffusers bf16"], lambda _, decode: 3 * decode),
        ("image", ["lean int8", "eager bf16", "lean bf16"],
         lambda forward, decode: 3 * (2 * 5 * forward + decode)),
    ],
)  # fmt: skip
def test_who_takes_part(
    kind: str, names: list[str], flops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The subject comes first, also where a peer decodes alike, and is no peer of itself; libraries
    take no steps. A guided step has two rows per image."""
    monkeypatch.setattr(models, "unet_cost", Cost)
    engine = tiny_engine()
    work = Work(Networks(engine), 3)
    subject = ("lean", "int8")
    peers = (subject, ("eager", "bf16"), ("lean", "bf16"), ("unet", "bf16"), ("diffusers", "bf16"))
    assert engine.vae is not None
    record = {"cost": model_record(engine.config), "decoder": decoder_record(engine.vae.config, 8)}
    found = contenders(kind, work, (subject, *peers), record, GenerationCheck(work, 5, "ddpm"))
    assert [c.name for c in found] == names and found[0].role == "subject"
    expected = flops(record["cost"]["total"]["flops"], record["decoder"]["flops"])
    assert found[0].flops == found[1].flops == expected
