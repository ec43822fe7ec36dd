"""The check of whole generations: right ones pass, however far chaos leads; every fault is seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_bench.contenders import BF16_TIMES_EAGER
from dit_bench.speed.forward import Networks, Work
from dit_bench.speed.generation import GenerationCheck
from dit_bench.subjects import random_model, random_vae
from dit_engine.backends import Backend, Denoiser
from dit_engine.config import ModelConfig
from dit_engine.engine import Engine
from dit_engine.vae import VAEConfig

STEPS = 4


@pytest.fixture(scope="module")
def engine() -> Engine:
    vae = random_vae(VAEConfig(block_out_channels=(32, 64), layers_per_block=1))
    return Engine(random_model(ModelConfig(2, 48, 2, 2, 8, num_classes=10)), vae, device="cpu")


@pytest.fixture(scope="module")
def pair(engine: Engine) -> GenerationCheck:
    """Of two images; the errors of eager bf16, which no test damages."""
    check = GenerationCheck(Work(Networks(engine), 2), STEPS, "ddpm")
    check.bf16_errors()
    return check


def checked(check: GenerationCheck, name: str, precision: str) -> tuple[float, float]:
    run = check.work.generation(name, precision, check.steps, check.sampler)
    return check(name, precision, run())


def test_chaos_is_no_fault() -> None:
    """The last latents of such a generation may differ from float32's many times as much as those
    of eager bf16, for no fault; its single steps may not."""
    builtin = Engine.from_pretrained("builtin", device="cpu")
    error, bound = checked(GenerationCheck(Work(Networks(builtin), 1), 8, "ddpm"), "lean", "bf16")
    assert error < 0.6 * bound


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_float32_takes_every_step_again(sampler: str, engine: Engine) -> None:
    """To its rounding, also where a sampler remembers the step before."""
    check = GenerationCheck(Work(Networks(engine), 3), STEPS, sampler)
    error, bound = checked(check, "lean", "fp32")
    assert error < 1e-5 and bound >= 1e-4
    errors, _ = check.errors("eager", "fp32")
    assert errors.shape == (STEPS + 1,) and errors.max() < 1e-6


class Faulty(Backend):
    """A backend that computes what eager does, but for one step, or for its labels."""

    def __init__(self, honest: Any, at: int, fault: str) -> None:
        self.honest, self.at, self.fault = honest, at, fault

    def prepare(self, labels: Tensor, timesteps: Tensor) -> Denoiser:
        wrong_time, wrong = timesteps.clone(), labels.clone()
        if self.fault == "timestep":
            wrong_time[self.at] = timesteps[self.at - 1 if self.at else 1]
        if self.fault == "label":
            wrong[0] = (wrong[0] + 1) % 10
        right = self.honest.prepare(labels, timesteps)
        faulty = self.honest.prepare(wrong, wrong_time)

        def denoise(x: Tensor, k: int) -> Tensor:
            if k != self.at:
                return right(x, k)
            found = faulty(x, k)
            if self.fault == "order":
                half = len(found) // 2
                found = torch.cat([found[:half].roll(1, 0), found[half:]])
            return found * 10 if self.fault == "scale" else found

        return denoise


@pytest.mark.parametrize(
    ("fault", "at"),
    [("timestep", 0), ("timestep", 2), ("label", 2), ("order", 1), ("scale", STEPS - 1)],
)
def test_one_wrong_step_is_seen(
    fault: str, at: int, pair: GenerationCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends: dict[Any, Any] = pair.work.engine._backends
    honest = pair.work.engine._backend("eager", "bf16")
    monkeypatch.setitem(backends, ("lean", "bf16"), Faulty(honest, at, fault))
    error, bound = checked(pair, "lean", "bf16")
    assert error > bound


def test_what_computes_as_eager_does_has_its_errors(pair: GenerationCheck) -> None:
    error, bound = checked(pair, "eager", "bf16")
    assert error == pytest.approx(bound / BF16_TIMES_EAGER)
    error, bound = checked(pair, "lean", "int8")
    assert error < bound


@pytest.mark.parametrize(
    "fault",
    [
        {"guidance_scale": 3.0},
        {"guidance_channels": None},
        {"seeds": [1, 0]},
        {"labels": "other"},
        {"images": "order"},
        {"images": "nan"},
        {"images": "without callback"},
    ],
    ids=str,
)
def test_a_wrong_setting_is_seen(
    fault: dict[str, Any], pair: GenerationCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Engine.generate

    def damaged(self: Engine, labels: Any, **options: Any) -> Any:
        if options["backend"] != "lean":
            return honest(self, labels, **options)
        changed = {k: v for k, v in fault.items() if k not in ("labels", "images")}
        if "labels" in fault:
            labels = [(label + 1) % self.config.num_classes for label in labels]
        made = honest(self, labels, **options | changed)
        kind = fault.get("images")
        if kind == "order" or (kind == "without callback" and options["callback"] is None):
            return replace(made, images=made.images.flip(0))
        return replace(made, images=made.images * torch.nan) if kind == "nan" else made

    monkeypatch.setattr(Engine, "generate", damaged)
    error, bound = checked(pair, "lean", "bf16")
    assert not error <= bound
