"""The loop on the server, without a server: noise, latents and pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import NAMES, tiny_dit, tiny_engine

from dit_engine.decode import to_uint8 as engine_to_uint8
from dit_engine.engine import Engine
from dit_engine.sampling.diffusion import PUBLISHED_DIFFUSION, Diffusion
from dit_engine.sampling.samplers import SAMPLERS
from dit_export.onnx.graphs import GuidedStep
from dit_export.server.sampling import Facts, Row, TorchGenerator, sample, to_uint8

USUAL = {name: [s.default_steps, s.spacing] for name, s in SAMPLERS.items()}
FACTS = Facts((4, 8, 8), True, 10, list(NAMES), USUAL, PUBLISHED_DIFFUSION)


# Blocks of 16: the last is drawn anew unless it is whole. The generator holds 624 words.
@pytest.mark.parametrize("shape", [(4, 4), (17,), (31,), (3, 5, 5), (4, 32, 32)])
def test_numbers_are_torchs(shape: tuple[int, ...]) -> None:
    """To 2e-7 of each number and 2e-7 on top: torch's vectorised functions round otherwise."""
    for seed in (0, 7, 2**31, 2**32 - 1, 2**32 + 7, 2**63 - 1):
        theirs, ours = torch.Generator().manual_seed(seed), TorchGenerator(seed)
        for _ in range(4):  # one after another: the generators must stay in step
            expected = torch.randn(shape, generator=theirs).numpy()
            actual = ours.randn(shape)
            assert actual.shape == shape and actual.dtype == np.float32
            np.testing.assert_allclose(actual, expected, rtol=2e-7, atol=2e-7)
    with pytest.raises(ValueError, match=r"noise of shape \(3, 5\): at least 16 numbers"):
        TorchGenerator(0).randn((3, 5))


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
        unused = inputs["coefficients"][:, 8] == 0
        assert not inputs["noise"][unused].any()  # drawn only where a step adds it
        with torch.inference_mode():
            z, x0 = module(*(torch.from_numpy(inputs[name]) for name in order))
        return z.numpy(), x0.numpy()

    return step


def test_rows_are_the_engines_latents(engine: Engine) -> None:
    """Side by side in one batch, each with its own sampler, steps and guidance."""
    asked: list[tuple[int, int, int, float, str]] = [
        (1, 0, 2, 1.0, "ddpm"), (9, 2**33 + 1, 4, 2.0, "ddim"), (0, 5, 5, 7.5, "dpm++"),
        (3, 11, 6, 4.0, "ddpm"),
    ]  # fmt: skip
    sizes: list[int] = []
    latents = sample([Row(FACTS, *each) for each in asked], torch_step(engine, sizes))
    assert sizes == [4, 4, 3, 3, 2, 1]  # a row leaves when it is through
    for (label, seed, steps, scale, sampler), z in zip(asked, latents, strict=True):
        expected = engine.generate(
            label, seed=seed, steps=steps, sampler=sampler, guidance_scale=scale,
            backend="eager", output="latent",
        ).images[0]  # fmt: skip
        error = np.abs(z - expected.numpy()).max() / expected.abs().max()
        assert error < 1e-5, (label, error)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize(
    "diffusion",
    [
        Diffusion(prediction="v_prediction", zero_terminal_snr=True, num_train_steps=100),
        Diffusion(beta_end=0.008, clip=1.0, variance="fixed_small"),
    ],
    ids=["v", "clip"],
)
def test_another_diffusion_than_the_published_one(diffusion: Diffusion, sampler: str) -> None:
    """Its betas, prediction and clamping, as the engine's plain samplers have them."""
    engine = Engine(tiny_dit(diffusion=diffusion), device="cpu")
    row = Row(replace(FACTS, diffusion=diffusion), 3, 11, 6, 4.0, sampler)
    (z,) = sample([row], torch_step(engine, []))
    expected = engine.generate(3, seed=11, steps=6, sampler=sampler, backend="eager").images[0]
    np.testing.assert_allclose(z, expected, rtol=0, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("value", [np.nan, 2e18])  # float32 holds the second, but not its square
def test_a_row_that_is_not_finite_leaves_the_others_alone(engine: Engine, value: float) -> None:
    sizes: list[int] = []
    plain = torch_step(engine, sizes)

    def step(inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        z, x0 = plain(inputs)
        z[(inputs["y"] == 7) & (len(sizes) == 2)] = value  # at its second step
        return z, x0

    kept, lost = sample([Row(FACTS, label, label, 4, 4.0, "ddim") for label in (3, 7)], step)
    assert np.isnan(lost).all() and sizes == [2, 2, 1, 1]
    (alone,) = sample([Row(FACTS, 3, 3, 4, 4.0, "ddim")], plain)
    np.testing.assert_allclose(kept, alone, rtol=0, atol=1e-5 * np.abs(alone).max())


def test_a_stopped_loop_asks_no_more(engine: Engine) -> None:
    sizes: list[int] = []
    answers = iter([False, False, True])
    sample([Row(FACTS, 3, 11, 6, 4.0, "ddpm")], torch_step(engine, sizes), lambda: next(answers))
    assert len(sizes) == 2


def test_pixels_are_the_engines() -> None:
    images = np.linspace(-1.5, 1.5, 2 * 3 * 64 * 64, dtype=np.float32).reshape(2, 3, 64, 64)
    expected = engine_to_uint8(torch.from_numpy(images))
    assert expected.min() == 0 and expected.max() == 255
    np.testing.assert_array_equal(to_uint8(images), expected)
