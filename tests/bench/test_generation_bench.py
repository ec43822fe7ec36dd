"""The check of whole generations: right ones pass, however far chaos leads; every fault is seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_engine
from torch import Tensor

from dit_bench.contenders import relative_error
from dit_bench.speed.forward import Networks, Work
from dit_bench.speed.generation import AGAIN_BOUND, BF16_TIMES_EAGER, GenerationCheck
from dit_engine.backends import Backend, Denoiser
from dit_engine.engine import Engine

STEPS = 6


@pytest.fixture(scope="module")
def builtin() -> Engine:
    return Engine.from_pretrained("builtin", device="cpu")


@pytest.fixture(scope="module")
def pair(builtin: Engine) -> GenerationCheck:
    """Of two images by the built-in model; the errors of eager bf16, which no test damages."""
    check = GenerationCheck(Work(Networks(builtin), 2), STEPS, "ddpm")
    check.bf16_errors()
    return check


def checked(check: GenerationCheck, name: str, precision: str) -> tuple[float, float]:
    run = check.work.generation(name, precision, check.steps, check.sampler)
    return check(name, precision, run())


def test_chaos_is_no_fault(builtin: Engine) -> None:
    """The last latents of such a generation may differ from float32's many times as much as those
    of eager bf16, for no fault; its single steps may not."""
    for seed in (0, 1):
        work = Work(Networks(builtin), 1)
        work.seeds = [seed]
        error, bound = checked(GenerationCheck(work, 20, "ddpm"), "lean", "bf16")
        assert error < 0.6 * bound


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_float32_takes_every_step_again(sampler: str) -> None:
    """To its rounding, also where a sampler remembers the step before."""
    engine = tiny_engine()
    check = GenerationCheck(Work(Networks(engine), 3), STEPS, sampler)
    error, bound = checked(check, "lean", "fp32")
    assert error < 1e-5 and bound >= 1e-4
    errors, _ = check.errors("eager", "fp32")
    assert errors.shape == (STEPS + 1,) and errors.max() < 1e-6


class Faulty(Backend):
    """A backend that computes what eager does, but for one step, or for its labels."""

    def __init__(self, honest: Any, at: int | None, fault: str) -> None:
        self.honest, self.at, self.fault = honest, at, fault

    def prepare(self, labels: Tensor, timesteps: Tensor) -> Denoiser:
        wrong_time, wrong = timesteps.clone(), labels.clone()
        if self.fault == "timestep":
            wrong_time[self.at] = timesteps[self.at - 1 if self.at else 1]
        if self.fault == "label":
            wrong[0] = (wrong[0] + 1) % 100
        right = self.honest.prepare(labels, timesteps)
        faulty = self.honest.prepare(wrong, wrong_time)

        def denoise(x: Tensor, k: int) -> Tensor:
            if k != self.at:
                return right(x, k)
            found = faulty(x, k)
            if self.fault == "order":
                half = len(found) // 2
                found = torch.cat([found[:half].roll(1, 0), found[half:]])
            return found * 1.1 if self.fault == "scale" else found

        return denoise


@pytest.mark.parametrize(
    ("fault", "at"),
    [
        ("timestep", 0), ("timestep", 3), ("timestep", STEPS - 1), ("label", 3), ("label", 5),
        ("order", 0), ("order", 3), ("order", STEPS - 1), ("scale", 0), ("scale", 3),
    ],
)  # fmt: skip
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
    assert error < 0.7 * bound


@pytest.mark.parametrize(
    "fault",
    [
        {"guidance_scale": 3.0},
        {"guidance_channels": None},
        {"seeds": [1, 0]},
        {"steps": STEPS, "sampler": "ddim"},
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


def test_the_parts_are_those_of_the_formula() -> None:
    """Of eager bfloat16: each step's error, by the engine itself, which begins from given latents
    and ends after one step's noise."""
    engine = tiny_engine()
    work = Work(Networks(engine), 2)
    check = GenerationCheck(work, STEPS, "ddim")
    errors, images = check.errors("eager", "bf16")
    first: list[Tensor] = []
    engine.generate(
        work.classes.tolist(), seeds=[0, 1], steps=STEPS, sampler="ddim", backend="eager",
        precision="fp32", callback=lambda progress: first.append(progress.latents.clone()),
    )  # fmt: skip
    rough: list[Tensor] = []
    made = engine.generate(
        work.classes.tolist(), seeds=[0, 1], steps=STEPS, sampler="ddim", backend="eager",
        precision="bf16", output="pt", callback=lambda p: rough.append(p.latents.clone()),
    )  # fmt: skip
    assert errors[0] == pytest.approx(relative_error(rough[0], first[0]))
    assert torch.equal(images, made.images * 2 - 1)
    assert np.isfinite(errors).all() and 1e-5 < errors[:-1].max() < AGAIN_BOUND
