"""A model that is plainly not trained is told; thresholds beside simulations."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_engine.training.card import NOISE_GUESS_MSE, Outcome, judge, write_card
from dit_engine.training.data import ImageSet
from dit_engine.training.loop import Stage
from dit_engine.training.loss import DiffusionLoss

# Two colours, black and white by halves: in [-1, 1] every pixel is 1 from their mean.
DATA = ImageSet(
    np.repeat(np.array([0, 255], np.uint8), 8 * 8 * 3 * 4).reshape(8, 8, 8, 3),
    np.zeros(8, int),
    ("a",),
)
DIT = Stage(5000, 3600.0, {"loss": 0.05, "mse": 0.04})
VAE = Stage(3000, 1800.0, {"loss": 0.1, "pixel": 0.03})


def test_the_guess_that_knows_nothing_of_the_images() -> None:
    """Its error in the loss that training reports, for latents of N(0, 1), is the closed form's."""
    generator = torch.Generator().manual_seed(0)
    loss = DiffusionLoss()
    t = torch.arange(1000).repeat(8)
    x0, noise = (torch.randn(len(t), 4, 8, 8, generator=generator) for _ in range(2))

    def guess(xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return loss.sqrt_one_minus_bar[t].view(-1, 1, 1, 1) * xt

    assert float(loss(guess, x0, t, noise)["mse"]) == pytest.approx(NOISE_GUESS_MSE, rel=3e-3)
    # And no other multiple of x_t is better.
    for factor in (0.95, 1.05):
        other = loss(lambda xt, t, f=factor: f * guess(xt, t), x0, t, noise)["mse"]
        assert float(other) > NOISE_GUESS_MSE


def shortcomings(transformer: Stage | None, autoencoder: Stage | None, decay: float = 0.999) -> str:
    return "; ".join(judge(DATA, transformer, autoencoder, decay, 0.998).shortcomings)


def test_what_is_trained_has_no_shortcomings() -> None:
    assert shortcomings(DIT, VAE) == ""
    assert shortcomings(None, None) == ""
    # An old checkpoint knows no losses; few steps are many where the average is short.
    assert shortcomings(Stage(5000, 1.0, {}), Stage(3000, 1.0, {})) == ""
    assert shortcomings(Stage(120, 1.0, {"loss": 0.1, "mse": 0.1}), VAE, decay=0.99) == ""


@pytest.mark.parametrize(
    ("transformer", "autoencoder", "message"),
    [
        (replace(DIT, step=41), VAE, "the transformer took 41 steps, and its weights"),
        (
            replace(DIT, losses={"mse": 0.3}),
            VAE,
            "the transformer's error, 0.3, is not below the 0.276",
        ),
        (replace(DIT, losses={"mse": math.nan}), VAE, "the transformer's error, nan, is not below"),
        (DIT, replace(VAE, step=499), "the autoencoder took 499 steps, and its weights are"),
        (
            DIT,
            replace(VAE, losses={"pixel": 1.01}),
            "the autoencoder's error, 1.01, is not below the 1",
        ),
    ],
)
def test_what_is_plainly_not_trained(transformer: Stage, autoencoder: Stage, message: str) -> None:
    found = shortcomings(transformer, autoencoder)
    assert found.startswith(message) and ";" not in found


def test_images_of_one_colour_are_no_shortcoming() -> None:
    plain = ImageSet(np.full((4, 8, 8, 3), 200, np.uint8), np.zeros(4, int), ("a",))
    stage = Stage(5000, 1.0, {"pixel": 0.004})
    assert judge(plain, DIT, stage, 0.999, 0.998).shortcomings == ()


def test_the_card_says_it_and_leaves_another_s_card(tmp_path: Path) -> None:
    untrained = judge(DATA, Stage(41, 360.0, {"loss": 0.9, "mse": 0.87}), VAE, 0.999, 0.998)
    write_card(tmp_path, DATA, untrained)
    text = (tmp_path / "README.md").read_text()
    assert "**This model is not trained**: the transformer took 41 steps" in text
    assert "- transformer: 41 steps in 6.0 min, loss 0.9\n" in text
    assert "- data: 8 images of 8 pixels in 1 classes" in text
    write_card(tmp_path, DATA, judge(DATA, DIT, VAE, 0.999, 0.998))
    assert "not trained" not in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("# My model\n")
    write_card(tmp_path, DATA, untrained)
    assert (tmp_path / "README.md").read_text() == "# My model\n"
    (tmp_path / "README.md").unlink()
    write_card(tmp_path, DATA, Outcome({}, ()))
