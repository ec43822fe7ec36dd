"""torch's random numbers without torch, and the sampling loop built on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_dit, tiny_engine

from dit_engine.engine import Engine
from dit_engine.sampling.diffusion import Diffusion
from dit_engine.sampling.samplers import SAMPLERS
from dit_export.onnx.graphs import GuidedStep
from dit_export.server.sampling import Row, sample, to_uint8
from dit_export.server.torch_random import TorchGenerator

SEEDS = [0, 1, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**63 - 1, *range(100, 130)]
# Fewer than 16 numbers are made one by one, 16 and more in blocks of 16, of which the last is
# drawn anew unless it is whole.
SHAPES = [(1,), (2,), (3, 5), (4, 4), (17,), (31,), (4, 2, 2), (3, 5, 5), (4, 8, 8), (4, 32, 32)]


@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_are_torchs(shape: tuple[int, ...]) -> None:
    """To 2e-7 of each number and 2e-7 on top: torch's vectorised functions round otherwise."""
    for seed in SEEDS:
        theirs, ours = torch.Generator().manual_seed(seed), TorchGenerator(seed)
        for _ in range(4):  # one after another: the generators must stay in step
            expected = torch.randn(shape, generator=theirs).numpy()
            actual = ours.randn(shape)
            assert actual.shape == shape and actual.dtype == np.float32
            np.testing.assert_allclose(actual, expected, rtol=2e-7, atol=2e-7)


def test_more_numbers_than_the_generator_holds() -> None:
    """624 words are made at a time."""
    theirs, ours = torch.Generator().manual_seed(5), TorchGenerator(5)
    for size in (600, 30, 7, 5, 10_000):
        expected = torch.randn(size, generator=theirs).numpy()
        np.testing.assert_allclose(ours.randn((size,)), expected, rtol=2e-7, atol=2e-7)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


def torch_step(engine: Engine, sizes: list[int]):
    """What the server's graph computes; sizes: filled with the batches that are asked for."""
    module = GuidedStep(engine.model, guided_channels=3)

    def step(inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        order = ("z", "x0_before", "noise", "t", "y", "guidance_scale", "coefficients")
        assert {inputs[name].dtype for name in ("t", "y")} == {np.dtype(np.int64)}
        sizes.append(len(inputs["z"]))
        with torch.inference_mode():
            z, x0 = module(*(torch.from_numpy(inputs[name]) for name in order))
        return z.numpy(), x0.numpy()

    return step


def test_rows_are_the_engines_latents(engine: Engine) -> None:
    """Side by side in one batch, each with its own sampler, steps and guidance."""
    rows = [
        Row(3, 11, 6, 4.0, "ddpm", "official"),
        Row(9, 2**33 + 1, 4, 2.0, "ddim", "official"),
        Row(0, 5, 5, 7.5, "dpm++", "linspace"),
        Row(1, 0, 2, 1.0, "ddpm", "official"),
    ]
    sizes: list[int] = []
    latents, _ = sample(rows, (4, 8, 8), True, torch_step(engine, sizes))
    assert sizes == [4, 4, 3, 3, 2, 1]  # a row leaves when it is through
    for row, z in zip(rows, latents, strict=True):
        expected = engine.generate(
            row.label, seed=row.seed, steps=row.steps, sampler=row.sampler,
            guidance_scale=row.scale, backend="eager", output="latent",
        ).images[0]  # fmt: skip
        error = np.abs(z - expected.numpy()).max() / expected.abs().max()
        assert error < 1e-5, (row, error)


@pytest.mark.parametrize(
    "diffusion",
    [
        {"prediction": "v_prediction", "zero_terminal_snr": True, "num_train_steps": 100},
        {"beta_end": 0.008, "clip": 1.0, "variance": "fixed_small"},
    ],
)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_another_diffusion_than_the_published_one(diffusion: dict[str, Any], sampler: str) -> None:
    """Its betas, prediction and clamping, as the engine's plain samplers have them."""
    made = Diffusion(**diffusion)
    engine = Engine(tiny_dit(diffusion=made), device="cpu")
    spacing = SAMPLERS[sampler].spacing
    row, step = Row(3, 11, 6, 4.0, sampler, spacing), torch_step(engine, [])
    ((z,), _) = sample([row], (4, 8, 8), True, step, diffusion=made)
    expected = engine.generate(3, seed=11, steps=6, sampler=sampler, backend="eager").images[0]
    np.testing.assert_allclose(z, expected, rtol=0, atol=1e-5 * expected.abs().max())
    ((other,), _) = sample([row], (4, 8, 8), True, step)
    assert np.abs(other - expected.numpy()).max() > 0.1 * expected.abs().max()


def test_a_row_that_is_not_finite_leaves_the_others_alone(engine: Engine) -> None:
    sizes: list[int] = []
    plain = torch_step(engine, sizes)

    def step(inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        z, x0 = plain(inputs)
        z[(inputs["y"] == 7) & (len(sizes) == 2)] = np.nan  # at its second step
        return z, x0

    rows = [Row(label, label, 4, 4.0, "ddim", "official") for label in (3, 7)]
    latents, lost = sample(rows, (4, 8, 8), True, step)
    assert lost == {1: 1} and sizes == [2, 2, 1, 1]
    ((alone,), _) = sample(rows[:1], (4, 8, 8), True, plain)
    np.testing.assert_allclose(latents[0], alone, rtol=0, atol=1e-5 * np.abs(alone).max())


def test_a_stopped_loop_asks_no_more(engine: Engine) -> None:
    sizes: list[int] = []
    answers = iter([False, False, True])
    rows = [Row(3, 11, 6, 4.0, "ddpm", "official")]
    sample(rows, (4, 8, 8), True, torch_step(engine, sizes), lambda: next(answers))
    assert len(sizes) == 2


def test_pixels_are_the_engines() -> None:
    from dit_engine import decode as pixels

    images = np.linspace(-1.5, 1.5, 2 * 3 * 64 * 64, dtype=np.float32).reshape(2, 3, 64, 64)
    expected = pixels.to_uint8(torch.from_numpy(images))
    assert expected.min() == 0 and expected.max() == 255
    np.testing.assert_array_equal(to_uint8(images), expected)
