"""The README.md beside a trained model, and how to see that a model is not trained.

A training that is too short ends without an error, and its model draws noise. Three things show it:

- There were fewer steps than the exponential average of the weights reaches back, 1 / (1 - decay).
- The transformer's error is no smaller than that of a guess which knows nothing about the images.
  With latents of mean 0 and variance 1, the best such guess of the noise in x_t is
  sqrt(1 - ᾱ_t) x_t. Its mean square error is ᾱ_t, which is 0.276 on average over t.
- The autoencoder is no nearer to the images than their mean colour is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dit_engine.io.files import atomic_path
from dit_engine.sampling.schedule import make_schedule
from dit_engine.training.data import ImageSet
from dit_engine.training.loop import Stage

NOISE_GUESS_MSE = float(np.mean(make_schedule(1000).alphas_cumprod))
_TITLE = "# Made by dit-train"


@dataclass(frozen=True)
class Outcome:
    """The stages by name, and sentences that say why the model is not trained, if it is not."""

    stages: dict[str, Stage]
    shortcomings: tuple[str, ...]


def judge(
    data: ImageSet,
    transformer: Stage | None,
    autoencoder: Stage | None,
    transformer_decay: float,
    autoencoder_decay: float,
) -> Outcome:
    """The outcome of a training. A stage without a checkpoint is None, and an old checkpoint has no
    losses: what is unknown is not judged."""
    shortcomings = []
    if transformer is not None:
        shortcomings += _few_steps("transformer", transformer, transformer_decay)
        mse = transformer.losses.get("mse")
        if mse is not None and not mse < NOISE_GUESS_MSE:  # NaN too
            shortcomings.append(
                f"the transformer's error, {mse:.3g}, is not below the {NOISE_GUESS_MSE:.3g} of a "
                "guess that knows nothing of the images"
            )
    if autoencoder is not None:
        shortcomings += _few_steps("autoencoder", autoencoder, autoencoder_decay)
        pixel, spread = autoencoder.losses.get("pixel"), _spread(data)
        if pixel is not None and not pixel < max(spread, 1 / 127.5):
            shortcomings.append(
                f"the autoencoder's error, {pixel:.3g}, is not below the {spread:.3g} of the "
                "images' mean colour"
            )
    stages = {"transformer": transformer, "autoencoder": autoencoder}
    return Outcome({k: v for k, v in stages.items() if v is not None}, tuple(shortcomings))


def describe(stage: Stage) -> str:
    """Text like "1234 steps in 56.7 min, loss 0.0389", without the loss if it is unknown."""
    loss = f", loss {stage.losses['loss']:.3g}" if "loss" in stage.losses else ""
    return f"{stage.step} steps in {stage.seconds / 60:.1f} min{loss}"


def write_card(directory: Path, data: ImageSet, outcome: Outcome) -> None:
    """Write README.md for the model in ``directory``, but do not replace one by somebody else."""
    path = directory / "README.md"
    if path.exists() and not path.read_text("utf-8", "replace").startswith(_TITLE):
        return
    lines = [_TITLE, ""]
    if outcome.shortcomings:
        lines += [f"**This model is not trained**: {'; '.join(outcome.shortcomings)}.", ""]
    lines += [f"- {name}: {describe(stage)}" for name, stage in outcome.stages.items()]
    lines += [
        f"- data: {len(data)} images of {data.size} pixels in {len(data.class_names)} classes",
        "",
        "`settings.json` in the directory above has every setting, `*/log.csv` the losses by step.",
    ]
    with atomic_path(path) as partial:
        partial.write_text("\n".join(lines) + "\n", "utf-8")


def _few_steps(name: str, stage: Stage, decay: float) -> list[str]:
    reach = round(1 / (1 - decay)) if decay < 1 else stage.step + 1
    if stage.step >= reach:
        return []
    return [f"the {name} took {stage.step} steps, and its weights are an average over {reach}"]


def _spread(data: ImageSet, images: int = 512) -> float:
    """The mean distance of pixels, in [-1, 1], from the mean colour of all images."""
    chosen = np.linspace(0, len(data) - 1, min(images, len(data))).astype(int)
    pixels = data.tensor(chosen)
    return float((pixels - pixels.mean(dim=(0, 2, 3), keepdim=True)).abs().mean())
