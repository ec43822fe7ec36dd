"""The README.md beside a trained model, and the signs that a model is not trained enough.

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
    data: ImageSet, transformer: Stage | None, autoencoder: Stage | None,
    transformer_decay: float, autoencoder_decay: float,
) -> Outcome:  # fmt: skip
    """The outcome of a training. A stage without a checkpoint is None, and an old checkpoint has no
    losses: what is unknown is not judged."""
    pixels = data.tensor(np.linspace(0, len(data) - 1, min(512, len(data))).astype(int))
    spread = float((pixels - pixels.mean(dim=(0, 2, 3), keepdim=True)).abs().mean())
    of_noise = f"{NOISE_GUESS_MSE:.3g} of a guess that knows nothing of the images"
    of_colour = f"{spread:.3g} of the images' mean colour"
    stages, shortcomings = {}, []
    for name, stage, decay, loss, limit, told in (
        ("transformer", transformer, transformer_decay, "mse", NOISE_GUESS_MSE, of_noise),
        # An error of one grey level is good whatever the images are.
        ("autoencoder", autoencoder, autoencoder_decay, "pixel", max(spread, 1 / 127.5), of_colour),
    ):
        if stage is None:
            continue
        stages[name] = stage
        reach = round(1 / (1 - decay)) if decay < 1 else stage.step + 1
        if stage.step < reach:
            shortcomings.append(
                f"the {name} took {stage.step} steps, and its weights are an average over {reach}"
            )
        error = stage.losses.get(loss)
        if error is not None and not error < limit:  # NaN too
            shortcomings.append(f"the {name}'s error, {error:.3g}, is not below the {told}")
    return Outcome(stages, tuple(shortcomings))


def write_card(directory: Path, data: ImageSet, outcome: Outcome) -> None:
    """Write README.md for the model in ``directory``, but do not replace one by somebody else."""
    path = directory / "README.md"
    if path.exists() and not path.read_text("utf-8", "replace").startswith(_TITLE):
        return
    lines = [_TITLE, ""]
    if outcome.shortcomings:
        lines += [f"**This model is not trained**: {'; '.join(outcome.shortcomings)}.", ""]
    for name, stage in outcome.stages.items():
        loss = f", loss {stage.losses['loss']:.3g}" if "loss" in stage.losses else ""
        lines.append(f"- {name}: {stage.step} steps in {stage.seconds / 60:.1f} min{loss}")
    lines += [
        f"- data: {len(data)} images of {data.size} pixels in {len(data.class_names)} classes",
        "",
        "`settings.json` in the directory above has every setting, `*/log.csv` the losses by step.",
    ]
    with atomic_path(path) as partial:
        partial.write_text("\n".join(lines) + "\n", "utf-8")
