"""``dit-train``: a small latent Diffusion Transformer of your own, autoencoder first."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dit_engine._version import __version__
from dit_engine.cli.errors import run_command

_HELP = {
    "data": "'avatars', or a folder with one directory of images a class",
    "size": "pixels along a side",
    "images_per_class": "avatars only: how many to render of each class",
    "vae_channels": "widths of the autoencoder's levels; each but the first halves the size",
    "kl_weight": "weight of the latents' KL divergence",
    "flip": "classes whose images may be mirrored",
    "seed": "of the initial weights and of every draw",
}


def build_parser() -> argparse.ArgumentParser:
    from dit_engine.training.run import TrainSettings

    parser = argparse.ArgumentParser(
        prog="dit-train",
        description="Train a VAE, then a DiT on its latents. Run it again to resume.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory of the run")
    parser.add_argument("--device", default=None, help="CUDA where there is one unless given")
    for stage, minutes in (("vae", 30.0), ("dit", 90.0)):
        budget = parser.add_mutually_exclusive_group()
        budget.add_argument(f"--{stage}-minutes", type=float, default=minutes, help="budget")
        budget.add_argument(f"--{stage}-steps", type=int, help="budget in steps instead")
    for field in fields(TrainSettings):
        default = field.default
        many = isinstance(default, tuple)
        kind = (int if field.name == "vae_channels" else str) if many else type(default)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=kind, default=default,
            nargs="+" if many else None, help=_HELP.get(field.name, "as in the paper's code"),
        )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _train(arguments))


def _train(arguments: argparse.Namespace) -> int:
    import torch

    from dit_engine.training.loop import Budget
    from dit_engine.training.run import TrainSettings, train

    values: dict[str, Any] = {f.name: getattr(arguments, f.name) for f in fields(TrainSettings)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

    def budget(steps: int | None, minutes: float) -> Budget:
        return Budget(steps, None if steps is not None else minutes)

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    finished = train(
        TrainSettings(**values),
        budget(arguments.vae_steps, arguments.vae_minutes),
        budget(arguments.dit_steps, arguments.dit_minutes),
        arguments.output,
        device,
    )
    print(f"Engine.from_pretrained({str(finished)!r}) loads the trained model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
