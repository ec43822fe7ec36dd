"""The DiT paper's two claims in miniature: more Gflops, a lower distance; and beside a U-Net.

``python -m dit_bench.scaling train --run runs/own -o runs/scaling`` trains DiTs of two sizes at two
patch sizes, and a U-Net that costs 2.5 % more than the largest of them, on the latents of a
finished ``dit-train`` run: the same images, steps, batch, optimiser and seed for all. Killed, it
resumes. ``python -m dit_bench.scaling measure …`` then samples each from the same noise, compares
and draws the figure.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported
    from dit_engine.first import leave_out_of_path

    leave_out_of_path()
    from dit_engine.console.run import wait_briefly

    wait_briefly()

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_engine.config import ModelConfig
from dit_engine.console.output import check_file
from dit_engine.console.parser import Parser
from dit_engine.console.run import entry, run_command
from dit_engine.io.printable import say
from dit_engine.model import DiT
from dit_engine.training.dit_stage import train_denoiser
from dit_engine.training.loop import Budget, LoopSettings
from dit_engine.training.vae_stage import read_latents

STEPS, BATCH, LEARNING_RATE = 3000, 64, 8e-4
SIZES = {"small": (4, 128, 2), "large": (6, 192, 3)}  # depth, width, heads
PATCHES = (4, 2)
UNET_CHANNELS = (40, 96)


class ClassUNet(nn.Module):
    """diffusers' UNet2DModel as (x, t, y) → (N, 2C, S, S): ADM's kind of network, residual blocks
    at two resolutions with attention at the lower one."""

    def __init__(self, channels: int, size: int, num_classes: int) -> None:
        super().__init__()
        try:
            from diffusers.models.unets.unet_2d import UNet2DModel
        except ImportError as error:
            raise ImportError(f"{error}: pip install 'dit-engine[diffusers]'") from error
        self.unet = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=2 * channels,
            block_out_channels=UNET_CHANNELS,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=32,
            norm_num_groups=8,
            layers_per_block=2,
            num_class_embeds=num_classes + 1,
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.unet(x, t, class_labels=y).sample


def networks(channels: int, size: int, num_classes: int) -> dict[str, Callable[[], nn.Module]]:
    """Name → a function that makes the network with fresh weights."""

    def dit(depth: int, width: int, heads: int, patch: int) -> DiT:
        model = DiT(
            ModelConfig(
                depth=depth, hidden_size=width, num_heads=heads, patch_size=patch,
                input_size=size, in_channels=channels, num_classes=num_classes,
            )
        )  # fmt: skip
        model.initialize_weights()
        return model

    found: dict[str, Callable[[], nn.Module]] = {
        f"DiT {name}/{patch}": lambda shape=shape, patch=patch: dit(*shape, patch)
        for name, shape in SIZES.items()
        for patch in PATCHES
    }
    return found | {"U-Net": lambda: ClassUNet(channels, size, num_classes)}


def folder(name: str) -> str:
    """A network's name as that of its directory: "DiT small/4" → "dit-small-4"."""
    return name.lower().replace(" ", "-").replace("/", "-")


def train(arguments: argparse.Namespace) -> int:
    """Every network in turn, the cheapest first."""
    path = arguments.run / "latents.safetensors"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: --run is a directory of dit-train")
    if arguments.steps < 2:
        raise ValueError(f"steps {arguments.steps} is below 2")
    means, deviations, labels = read_latents(path)
    classes = int(labels.max()) + 1
    made = networks(means.shape[1], means.shape[2], classes)
    chosen = arguments.only or list(made)
    for name in chosen:
        if name not in made:
            raise ValueError(f"network {name!r} is unknown; choose among {', '.join(made)}")
    settings = LoopSettings(
        Budget(steps=arguments.steps), LEARNING_RATE, warmup_steps=200, ema_decay=0.999,
        keep_steps=(arguments.steps // 2, arguments.steps),
    )  # fmt: skip
    for name in chosen:
        torch.manual_seed(settings.seed)
        train_denoiser(
            made[name](), classes, (means, deviations), labels, settings,
            arguments.output / folder(name), BATCH,
        )  # fmt: skip
    return 0


def measure(arguments: argparse.Namespace) -> int:
    """Distances of all networks, printed, written as JSON and drawn."""
    from dit_bench.quality.fd_lite0 import write_report
    from dit_bench.scaling_measure import measure, orders, plot
    from dit_engine.engine import Engine

    for path in (arguments.json, arguments.plot):
        check_file(path)  # before the long run
    engine = Engine.from_pretrained(arguments.run / "model")
    if engine.vae is None:
        raise ValueError(f"{arguments.run / 'model'} has no VAE")
    config = engine.config
    if arguments.samples < 1 or arguments.samples % config.num_classes:
        raise ValueError(
            f"samples {arguments.samples} is no positive multiple of {config.num_classes} classes"
        )
    made = networks(config.in_channels, config.input_size, config.num_classes)
    folders = {name: arguments.output / folder(name) for name in made}
    steps = (arguments.steps // 2, arguments.steps)
    report = measure(
        made, folders, steps, engine.vae, arguments.run / "data", arguments.samples,
        arguments.output / "measured.json", config.num_classes,
    )  # fmt: skip
    report["training"] = {"steps": arguments.steps, "batch": BATCH, "learning_rate": LEARNING_RATE}
    write_report(report, arguments.json)
    plot(report, arguments.plot)
    for row in report["points"]:
        cost = f"{row['steps']:>6} steps {row['gmacs']:>7.3f} Gflops"
        counts = f"N = {row['n']} against {row.get('n_reference', 'unknown')}"
        say(f"{row['network']:<14} {cost}  {report['metric']} {row['distance']:7.1f} ({counts})")
    for step in steps:
        values = [distance for _, _, distance in orders(report["points"], step)]
        falls = all(a > b for a, b in pairwise(values))
        say(f"{step} steps: more Gflops {'always' if falls else 'NOT always'} a lower distance")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("python -m dit_bench.scaling", "More Gflops, a lower distance: in miniature.")
    commands = parser.add_subparsers(dest="command", required=True)
    about = "train every network, or go on"
    training = commands.add_parser("train", help=about, description=about)
    training.add_argument("--run", type=Path, required=True, help="a finished run of dit-train")
    training.add_argument("-o", "--output", type=Path, required=True)
    training.add_argument("--steps", type=int, default=STEPS)
    training.add_argument("--only", nargs="+", help="networks by name")
    training.set_defaults(function=train)
    about = "sample every network, at half its steps and at all, and compare"
    measuring = commands.add_parser("measure", help=about, description=about)
    measuring.add_argument("--run", type=Path, required=True, help="the dit-train run")
    measuring.add_argument("-o", "--output", type=Path, required=True, help="that of train")
    measuring.add_argument("--steps", type=int, default=STEPS, help="that of train")
    measuring.add_argument("--samples", type=int, default=2400, help="of each network")
    measuring.add_argument("--json", type=Path, required=True)
    measuring.add_argument("--plot", type=Path, required=True, help="PNG")
    measuring.set_defaults(function=measure)
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> int:
    arguments: Any = build_parser().parse_args(argv)
    return run_command(lambda: arguments.function(arguments))


if __name__ == "__main__":
    sys.exit(main())
