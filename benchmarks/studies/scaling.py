"""The DiT paper's two claims in miniature: more Gflops give a lower distance; DiT beside a U-Net.

``python benchmarks/studies/scaling.py train --run runs/own -o runs/scaling`` trains DiTs of two
sizes at two patch sizes, and a U-Net that costs 2.5 % more than the largest of them, on the latents
of a finished ``dit-train`` run. All have the same images, steps, batch, optimiser and seed. A
training that was killed resumes. ``python benchmarks/studies/scaling.py measure …`` then samples
each network from the same noise, compares their images with held-out ones and draws the figure.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported
    from dit_engine.console.run import wait_briefly

    wait_briefly()

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dit_bench.cost import Cost, counted
from dit_bench.machine import describe
from dit_bench.quality.fd_lite0 import METRIC, Halves, load_halves, recognised
from dit_bench.quality.features import FeatureNetwork, load_network
from dit_bench.quality.metrics import frechet_distance, moments_of
from dit_bench.report import Row, new_report, write
from dit_bench.show.plots import distance_figure, drawn
from dit_bench.show.reports import report_tables
from dit_bench.show.tables import show
from dit_engine.backends.lean.vae import LeanDecoder
from dit_engine.checkpoint.weights import load_into
from dit_engine.config import ModelConfig
from dit_engine.console.bars import Bar
from dit_engine.console.output import check_file
from dit_engine.console.parser import Parser
from dit_engine.console.run import entry, run_command
from dit_engine.decode import LatentDecoder, to_uint8
from dit_engine.io.files import atomic_path
from dit_engine.model import DiT
from dit_engine.sampling.noise import PerImageNoise
from dit_engine.sampling.samplers import SAMPLERS
from dit_engine.sampling.schedule import make_schedule
from dit_engine.training.dit_stage import train_denoiser
from dit_engine.training.loop import Budget, LoopSettings, kept_path
from dit_engine.training.vae_stage import read_latents

STEPS, BATCH, LEARNING_RATE = 3000, 64, 8e-4
SIZES = {"small": (4, 128, 2), "large": (6, 192, 3)}  # depth, width, heads
PATCHES = (4, 2)
UNET_CHANNELS = (40, 96)
SAMPLER, SAMPLING_STEPS, SPACING = "dpm++", 25, "linspace"
CHUNK = 64  # images sampled at once
SETTINGS = {"metric": METRIC, "sampler": SAMPLER, "steps": SAMPLING_STEPS, "spacing": SPACING,
            "guidance_scale": 1.0, "precision": "bf16", "training_seeds": 1,
            "batch": BATCH, "learning_rate": LEARNING_RATE}  # fmt: skip

Networks = dict[str, Callable[[], nn.Module]]
Decoder = Callable[[Tensor], Tensor]


class ClassUNet(nn.Module):
    """diffusers' UNet2DModel as (x, t, y) → (N, 2C, S, S). It is ADM's kind of network: residual
    blocks at two resolutions, with attention at the lower one."""

    def __init__(self, channels: int, size: int, num_classes: int) -> None:
        super().__init__()
        try:
            from diffusers.models.unets.unet_2d import UNet2DModel
        except ImportError as error:
            raise ImportError(f"{error}: pip install 'dit-engine[diffusers]'") from error
        self.unet = UNet2DModel(
            sample_size=size, in_channels=channels, out_channels=2 * channels,
            block_out_channels=UNET_CHANNELS, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=32,
            norm_num_groups=8, layers_per_block=2, num_class_embeds=num_classes + 1,
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.unet(x, t, class_labels=y).sample


def networks(channels: int, size: int, num_classes: int) -> Networks:
    """Name → a function that makes the network with fresh weights."""

    def dit(depth: int, width: int, heads: int, patch: int) -> DiT:
        model = DiT(ModelConfig(depth=depth, hidden_size=width, num_heads=heads, patch_size=patch,
                                input_size=size, in_channels=channels,
                                num_classes=num_classes))  # fmt: skip
        model.initialize_weights()
        return model

    found: Networks = {f"DiT {name}/{patch}": partial(dit, *shape, patch)
                       for name, shape in SIZES.items() for patch in PATCHES}  # fmt: skip
    return found | {"U-Net": partial(ClassUNet, channels, size, num_classes)}


def folder(name: str) -> str:  # "DiT small/4" → "dit-small-4"
    return name.lower().replace(" ", "-").replace("/", "-")


def train(arguments: argparse.Namespace) -> int:
    """Train every network in turn, the cheapest first."""
    if arguments.steps < 2:
        raise ValueError(f"steps {arguments.steps} is below 2")
    means, deviations, labels = read_latents(arguments.run / "latents.safetensors")
    classes = int(labels.max()) + 1
    settings = LoopSettings(
        Budget(steps=arguments.steps), LEARNING_RATE, warmup_steps=200, ema_decay=0.999,
        keep_steps=(arguments.steps // 2, arguments.steps),
    )  # fmt: skip
    for name, make in networks(means.shape[1], means.shape[2], classes).items():
        torch.manual_seed(settings.seed)
        target = arguments.output / folder(name)
        train_denoiser(make(), classes, (means, deviations), labels, settings, target, BATCH)
    return 0


def sample(network: nn.Module, labels: Sequence[int], seeds: Sequence[int], size: int) -> Tensor:
    """Latents (N, 4, size, size) without guidance, as for the paper's figures. Image i starts from
    the noise of ``seeds[i]`` whatever the network."""
    schedule = make_schedule(SAMPLING_STEPS, SPACING)
    y = torch.tensor(labels)
    timesteps = torch.tensor(schedule.timesteps.copy())
    noise = PerImageNoise(seeds, (4, size, size), torch.device("cpu"))

    def denoise(z: Tensor, k: int) -> Tensor:
        x = z.to(torch.bfloat16)
        return network(x, timesteps[k].expand(len(z)), y).to(z.dtype)

    with torch.inference_mode():
        z = noise.start()
        return SAMPLERS[SAMPLER].function(denoise, z, schedule, noise, lambda *_: None)


def cost_of(network: nn.Module, size: int) -> Cost:
    """What a forward of one image costs; moves the network to the meta device."""
    network.to("meta")
    with torch.device("meta"), torch.inference_mode():
        x, index = torch.empty(1, 4, size, size), torch.empty(1, dtype=torch.long)
        return counted(network, lambda: network(x, index, index))


def measured(network: nn.Module, halves: Halves, size: int, decode: Decoder,
             extractor: FeatureNetwork) -> Row:  # fmt: skip
    """What a row says about the images of a network, one for each label with seeds 0, 1, …;
    size: of the latents."""
    network.to(torch.bfloat16).eval().requires_grad_(False)
    labels, parts = halves.labels.tolist(), []
    for start in Bar(range(0, len(labels), CHUNK), "sampling"):
        part = labels[start : start + CHUNK]
        z = sample(network, part, range(start, start + len(part)), size)
        parts.append(extractor.extract(to_uint8(decode(z))).pooled)
    features, reference = np.concatenate(parts), moments_of(halves.features_b)
    hits = recognised(features, halves.labels, halves.features_a, halves.labels)
    return {"distance": frechet_distance(moments_of(features), reference), "n": len(features),
            "n_reference": reference.count, "recognised": float(hits.mean())}  # fmt: skip


def measure(arguments: argparse.Namespace) -> int:
    """The distances of all networks, printed, written as JSON and drawn."""
    from dit_engine.engine import Engine

    for path in (arguments.json, arguments.plot):
        check_file(path)
    engine = Engine.from_pretrained(arguments.run / "model")
    if (vae := engine.vae) is None:
        raise ValueError(f"{arguments.run / 'model'} has no VAE")
    config, samples = engine.config, arguments.samples
    classes, size = config.num_classes, config.input_size
    if samples < 1 or samples % classes:
        raise ValueError(f"samples {samples} is no positive multiple of {classes} classes")
    works = [
        (name, make, step, kept_path(arguments.output / folder(name), step))
        for name, make in networks(config.in_channels, size, classes).items()
        for step in (arguments.steps // 2, arguments.steps)
    ]
    for name, _, _, path in works:
        if not path.is_file():
            raise ValueError(f"{path} does not exist: train {name!r} for {arguments.steps} steps")
    decoder, extractor = LatentDecoder(vae, torch.device("cpu")), load_network("lite0")
    pixels = size * vae.config.downsampling
    halves = load_halves(arguments.run / "data", samples // classes, pixels, extractor)
    report = new_report("scaling", describe(torch.device("cpu")), SETTINGS)
    for name, make, step, path in works:
        cost, network = cost_of(make(), size), make()
        load_into(network, path)
        found = measured(network, halves, size, lambda z: decoder(z, "bf16", LeanDecoder),
                         extractor)  # fmt: skip
        report["rows"].append({"section": "scaling", "case": name, "contender": f"{step} steps",
                               "status": "ok", "steps": step, "gmacs": cost.macs / 1e9,
                               "parameters": cost.parameters, **found})  # fmt: skip
    report["complete"] = True
    write(report, arguments.json)
    if (figure := distance_figure(report)) is not None:
        with atomic_path(arguments.plot) as partly:
            partly.write_bytes(drawn(figure, "png"))
    show(report_tables(report))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("scaling.py", "More Gflops, a lower distance: in miniature.")
    commands = parser.add_subparsers(dest="command", required=True)
    for function, about in (
        (train, "train every network, or go on"),
        (measure, "sample every network, at half its steps and at all, and compare"),
    ):
        one = commands.add_parser(function.__name__, help=about, description=about)
        one.add_argument("--run", type=Path, required=True, help="a finished run of dit-train")
        one.add_argument("-o", "--output", type=Path, required=True, help="the networks' folder")
        one.add_argument("--steps", type=int, default=STEPS, help="of the training")
        one.set_defaults(function=function)
        if function is measure:
            one.add_argument("--samples", type=int, default=2400, help="of each network")
            one.add_argument("--json", type=Path, required=True)
            one.add_argument("--plot", type=Path, required=True, help="PNG")
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> int:
    arguments: Any = build_parser().parse_args(argv)
    return run_command(lambda: arguments.function(arguments))


if __name__ == "__main__":
    sys.exit(main())
