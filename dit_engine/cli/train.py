"""``dit-train``: a small latent Diffusion Transformer of your own, autoencoder first."""

from __future__ import annotations

if __name__ == "__main__":  # before anything else is imported
    from dit_engine.first import leave_out_of_path

    leave_out_of_path()

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from signal import SIGINT
from typing import Any

from dit_engine.console.parser import Parser
from dit_engine.console.run import entry, output_is_a_file, run_command
from dit_engine.io.printable import one_line

# One for every field of TrainSettings.
_HELP = {
    "data": "'avatars', or a folder with one directory of images a class; they are turned as EXIF "
    "says, and what is transparent lies on white",
    "size": "pixels along a side",
    "images_per_class": "avatars only: how many to render of each class",
    "vae_channels": "widths of the autoencoder's levels; each but the first halves the size",
    "vae_batch_size": "images in one step of the autoencoder",
    "vae_learning_rate": "of the autoencoder after warm-up; falls to 0 over the budget",
    "kl_weight": "weight of the latents' KL divergence",
    "depth": "transformer blocks",
    "hidden_size": "width of the transformer",
    "num_heads": "attention heads; they share the width evenly",
    "patch_size": "latent pixels along a side of one token",
    "batch_size": "latents in one step of the transformer",
    "learning_rate": "of the transformer after warm-up; falls to 0 over the budget",
    "ema_decay": "of the average of the transformer's weights, which is what is kept",
    "flip": "classes whose images are also learnt mirrored",
    "seed": "of the initial weights and of every draw",
}


def build_parser() -> argparse.ArgumentParser:
    from dit_engine.training.run import TrainSettings

    parser = Parser("dit-train", "Train a VAE, then a DiT on its latents. Run it again to resume.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory of the run")
    parser.add_argument("--device", help="cpu, cuda, …; CUDA where there is one unless given")
    parser.add_argument("--threads", type=int, help="of the CPU; as many as other programs leave "
                        "processors free, unless given")  # fmt: skip
    for stage, name, minutes in (
        ("vae", "autoencoder", 30.0),
        ("dit", "transformer", 90.0),
        ("decoder", "autoencoder's decoder alone, at the end,", None),
    ):
        budget = parser.add_mutually_exclusive_group()
        budget.add_argument(f"--{stage}-minutes", type=float, default=minutes,
                            help=f"how long to train the {name}")  # fmt: skip
        budget.add_argument(f"--{stage}-steps", type=int,
                            help=f"train the {name} for so many steps instead")  # fmt: skip
    for field in fields(TrainSettings):
        default = field.default
        many = isinstance(default, tuple)
        kind = (int if field.name == "vae_channels" else str) if many else type(default)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=kind, default=default,
            nargs="+" if many else None, help=_HELP[field.name],
        )  # fmt: skip
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    output_is_a_file()
    return run_command(lambda: _train(arguments))


def _train(arguments: argparse.Namespace) -> int:
    from dit_engine.training.loop import Budget
    from dit_engine.training.run import TrainSettings, is_begun, train
    from dit_engine.training.stopping import Stopped, termination_as_interrupt

    if arguments.threads is not None and arguments.threads < 1:
        raise ValueError(f"threads {arguments.threads} is not a positive integer")
    values: dict[str, Any] = {f.name: getattr(arguments, f.name) for f in fields(TrainSettings)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

    def budget(stage: str) -> Budget | None:
        steps, minutes = (getattr(arguments, f"{stage}_{unit}") for unit in ("steps", "minutes"))
        if steps is None and minutes is None:
            return None
        return Budget(steps, None if steps is not None else minutes)

    vae, dit = budget("vae"), budget("dit")
    assert vae is not None and dit is not None  # they have defaults
    given = {} if arguments.threads is None else {"threads": arguments.threads}
    with termination_as_interrupt():
        try:
            finished, outcome = train(
                TrainSettings(**values),
                vae,
                dit,
                arguments.output,
                arguments.device,
                budget("decoder"),
                **given,
            )
        except KeyboardInterrupt as error:
            said = one_line(error) or "stopped between two checkpoints"
            said += f"; the same command again goes on from what is in {arguments.output}"
            raise Stopped(
                said if is_begun(arguments.output) else "stopped before anything was kept",
                getattr(error, "exit_code", 128 + SIGINT) - 128,
            ) from None
    trained = "model, which is not trained" if outcome.shortcomings else "trained model"
    print(f"Engine.from_pretrained({str(finished)!r}) loads the {trained}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
