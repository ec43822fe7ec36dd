"""Rows, verdicts and shares on made-up times; forwards and steps against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_dit, tiny_engine
from torch import Tensor

from dit_bench import latency
from dit_bench.ceilings import Ceilings
from dit_bench.contenders import Cast
from dit_bench.forwards import CHANNELS, SCALE, STEP, Networks, Work
from dit_bench.generation_check import GenerationCheck
from dit_bench.latency import NOISE_BOUND, Contender, Task, Timer, noisy, shares, verdict
from dit_bench.measure import better
from dit_bench.peers import relative_error
from dit_bench.timing import Interleaved, Spread
from dit_engine.engine import Engine
from dit_engine.sampling.guidance import guided

CEILINGS = Ceilings(10.0, {"fp32": 0.1, "bf16": 1.0}, 1024, 256, {})


def row(name: str, ratio: tuple[float, float, float], **more: Any) -> dict[str, Any]:
    spread = dict(zip(("p5", "median", "p95"), ratio, strict=True))
    return {"name": name, "role": "peer", "noisy": False, "ratio": spread} | more


def test_a_verdict_needs_ratios_on_one_side_and_quiet_times() -> None:
    own = {"name": "lean", "noisy": False}
    assert verdict(row("eager", (1.5, 2.0, 2.5)), own) == "lean is 2.00× as quick"
    assert verdict(row("eager", (0.4, 0.5, 0.6)), own) == "eager is 2.00× as quick"
    assert verdict(row("eager", (0.9, 2.0, 2.5)), own) == "no difference shown"
    assert verdict(row("eager", (1.5, 2, 2.5), noisy=True), own) == "noisy: no verdict"
    assert verdict(row("eager", (1.5, 2, 2.5)), own | {"noisy": True}) == "noisy: no verdict"
    assert verdict(row("U", (1.5, 2, 2.5), role="other network"), own) == "another network"


def test_noise_is_a_wide_spread_or_too_few_samples() -> None:
    half = NOISE_BOUND / 2
    assert not noisy(Spread(1 - 0.99 * half, 1, 1 + 0.99 * half, 9))
    assert noisy(Spread(1 - 1.01 * half, 1, 1 + 1.01 * half, 9))
    assert noisy(Spread(1, 1, 1, 4)) and not noisy(Spread(1, 1, 1, 5))


def test_shares_of_the_ceilings_in_closed_form() -> None:
    found = shares({"tflop_s": 0.25, "precision": "bf16", "flops_per_byte": 50.0}, CEILINGS)
    assert found["percent_of_matmul"] == pytest.approx(25)
    assert found["percent_of_copy"] == pytest.approx(50)  # 0.25e12 / 50 bytes a second: 5 GB/s
    assert found["bound_by"] == "memory"  # the ridge lies at 100 FLOPs a byte
    row = {"tflop_s": 0.25, "precision": "bf16", "flops_per_byte": 200.0}
    assert shares(row, CEILINGS)["bound_by"] == "arithmetic"
    assert shares({"tflop_s": 1.0, "precision": "int8"}, CEILINGS) == {}
    assert shares({}, CEILINGS) == {}


def test_the_better_ceiling_is_kept() -> None:
    again = Ceilings(8.0, {"fp32": 0.3, "bf16": 0.5}, 1024, 256, {})
    assert better(CEILINGS, again) == Ceilings(10.0, {"fp32": 0.3, "bf16": 1.0}, 1024, 256, {})


def test_rows_of_a_timed_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up times; one contender is wrong, one cannot run."""
    samples = {"lean": [10.0, 10.0, 20.0], "eager": [30.0, 30.0, 60.0]}
    monkeypatch.setattr(latency, "interleave_visits", lambda functions, *_, **__: Interleaved(
        {name: samples[name] for name in functions}))  # fmt: skip
    expected = torch.ones(4)

    def missing() -> Any:
        raise ImportError("no such package")

    def giving(value: float) -> Any:
        return lambda: lambda: expected * value

    contenders = [
        Contender("lean", "subject", "fp32", giving(1.0), flops=10**9, weight_bytes=10**7),
        Contender("eager", "peer", "fp32", giving(1 + 1e-6), flops=10**9),
        Contender("broken", "peer", "fp32", giving(1.1)),
        Contender("absent", "peer", "fp32", missing),
        Contender("nan", "peer", "fp32", giving(float("nan"))),
    ]
    timer = Timer(torch.device("cpu"), 3, 1.0, CEILINGS)
    rows, built = timer.run(Task("S/2", "forward", 2, contenders, expected, 0.0))
    lean, eager, broken, absent, nan = rows
    assert list(built.functions) == ["lean", "eager"]
    assert lean["ms"]["median"] == 10 and lean["noisy"] and lean["images_s"] == 200
    assert lean["tflop_s"] == pytest.approx(0.1)
    assert lean["percent_of_matmul"] == pytest.approx(100)
    assert eager["ratio"] == {"p5": 3, "median": 3, "p95": 3, "n": 3}  # within each round
    assert eager["verdict"] == "noisy: no verdict" and "ratio" not in lean
    assert broken["status"] == "wrong" and broken["error"] == pytest.approx(0.1)
    assert nan["status"] == "wrong" and "ms" not in nan and "ms" not in broken
    assert (absent["status"], absent["reason"]) == ("skipped", "no such package")


@pytest.fixture(scope="module")
def work() -> Work:
    engine = Engine(tiny_dit(numerics="diffusers"), None, device="cpu")
    return Work(Networks(engine), 3)


@torch.inference_mode()
def test_everyone_computes_the_forward(work: Work) -> None:
    model = work.engine.model
    expected = model(work.x, work.timesteps[STEP].expand(3), work.labels)
    pytest.importorskip("diffusers")
    for function in (work.eager("fp32"), work.backend("lean", "fp32"), work.diffusers("fp32")):
        assert relative_error(function(), expected) < 1e-5
    with pytest.raises(ValueError, match="numerics 'official'"):
        Work(Networks(tiny_engine(vae=False)), 1).diffusers("fp32")


@torch.inference_mode()
def test_a_guided_step_is_ddpms_mean(work: Work) -> None:
    """Against the formula, by hand: guidance on three channels, then the posterior's mean."""
    config, model, schedule = work.engine.config, work.engine.model, work.schedule
    labels = torch.cat([work.labels, torch.full_like(work.labels, config.null_class)])

    def denoiser(x: Tensor, k: int) -> Tensor:
        return model(x, work.timesteps[STEP].expand(len(x)), labels)

    eps = guided(denoiser, torch.full((3,), SCALE), CHANNELS)(work.x, 0)[:, :4].double()
    z, a = work.x.double(), schedule.alphas_cumprod[STEP]
    x0 = (z - (1 - a) ** 0.5 * eps) / a**0.5
    expected = schedule.posterior_mean_coef1[STEP] * x0 + schedule.posterior_mean_coef2[STEP] * z
    for name in ("eager", "lean"):
        assert relative_error(work.guided_step(name, "fp32")(), expected) < 1e-5


def test_the_subject_is_no_peer_of_itself(work: Work) -> None:
    peers = [("lean", "fp32"), ("eager", "fp32"), ("unet", "fp32"), ("openvino", "fp32")]
    cast = Cast(Networks(work.engine), ("lean", "fp32"), peers, 1000)
    assert [c.role for c in cast.step(work)] == ["subject", "peer"]  # libraries take no steps
    assert [c.flops for c in cast.step(work)] == [2 * 1000 * 6] * 2  # two rows an image
    check = GenerationCheck(work, 5, "ddpm")
    assert [c.name for c in cast.image(work, check, 0)] == ["lean fp32", "eager fp32"]
    assert cast.image(work, check, 7)[0].flops == 3 * (2 * 5 * 2000 + 14)
