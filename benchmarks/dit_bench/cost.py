"""Parameters and arithmetic of networks, and ``dit-bench gflops``: the paper's table beside ours.

A MAC is one multiply-add of a matrix product or convolution. The DiT paper (Peebles & Xie 2022,
arXiv 2212.09748) calls this a flop, so its "118.6 Gflops" for XL/2 are GMACs. True FLOPs are
twice that. Elementwise work (norms, activations, softmax, modulation, biases) is not counted.

A DiT's cost follows from a formula, which torch's operator counting confirms; other networks are
counted by torch alone.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dit_bench.machine import describe
from dit_bench.report import PARTS, Report, Row, new_report
from dit_engine.config import ModelConfig
from dit_engine.console.output import STDOUT
from dit_engine.model import FREQUENCY_EMBEDDING_SIZE, DiT
from dit_engine.vae import AutoencoderKL, VAEConfig

SIZES = (256, 512)
SOURCE = "Peebles & Xie 2022, arXiv 2212.09748, appendix, table of all models; 512 px: section 5.1"
# The appendix's "Flops (G)" at 256 px, which are multiply-adds, and "Params (M)", which leave out
# the fixed position table.
PAPER = {
    "S/8": (0.36, 33), "S/4": (1.41, 33), "S/2": (6.06, 33),
    "B/8": (1.42, 131), "B/4": (5.56, 130), "B/2": (23.01, 130),
    "L/8": (5.01, 459), "L/4": (19.70, 458), "L/2": (80.71, 458),
    "XL/8": (7.39, 676), "XL/4": (29.05, 675), "XL/2": (118.64, 675),
}  # fmt: skip
GFLOPS_512 = {"XL/2": 524.60}
UNET = "LDM-4 U-Net"
"""The network that the paper compares with, of Rombach et al. 2022, for 256 px, by class."""
UNET_GFLOPS, UNET_MILLIONS = 103.6, 400  # in the DiT paper
UNET_SHAPE, CONTEXT = (3, 64, 64), 512  # of its latents (downsampling 4), and of its class
TOLERANCE = 1e-3
"""Formula and counter may differ by so much."""


@dataclass(frozen=True)
class Cost:
    """The cost of a network or a part of one, for one image and one forward pass."""

    parameters: int = 0
    macs: int = 0

    @property
    def flops(self) -> int:
        """Additions and multiplications, each counted as one."""
        return 2 * self.macs

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.macs + other.macs)

    def __mul__(self, times: int) -> Cost:
        """The cost of ``times`` such parts, each with weights of its own."""
        return Cost(self.parameters * times, self.macs * times)


def total(parts: Mapping[str, Cost]) -> Cost:
    return sum(parts.values(), Cost())


def dit_cost(config: ModelConfig) -> dict[str, Cost]:
    """Costs of a DiT's parts, whose parameters sum to those of `dit_engine.model.DiT`.

    "patch_embed" holds the frozen position table; "conditioning" is the embedding of time step
    and label; "adaln" holds the modulations of every block and of the final layer. Both of these
    depend on nothing but (t, y), so a sampler may compute them before its loop. The core of
    attention is QKᵀ and the weighted sum of V.
    """
    d, t, depth = config.hidden_size, config.num_tokens, config.depth
    patch, hidden = config.patch_size**2, config.mlp_hidden_size

    def linear(inputs: int, outputs: int, rows: int) -> Cost:
        return Cost((inputs + 1) * outputs, inputs * outputs * rows)

    return {
        "patch_embed": linear(config.in_channels * patch, d, t) + Cost(t * d),
        "conditioning": linear(FREQUENCY_EMBEDDING_SIZE, d, 1)
        + linear(d, d, 1)
        + Cost(config.label_rows * d),
        "adaln": linear(d, 6 * d, 1) * depth + linear(d, 2 * d, 1),
        "attention_linear": (linear(d, 3 * d, t) + linear(d, d, t)) * depth,
        "attention_core": Cost(macs=2 * t * t * d) * depth,
        "mlp": (linear(d, hidden, t) + linear(hidden, d, t)) * depth,
        "final": linear(d, patch * config.out_channels, t),
    }


def needed_weights(config: ModelConfig) -> int:
    """Parameters that every forward must read. Those of the conditioning, a third of the model, are
    left out, because a sampler may compute it before its loop and then never reads them.
    """
    hoisted = ("conditioning", "adaln")
    return sum(p.parameters for name, p in dit_cost(config).items() if name not in hoisted)


def counted(module: nn.Module, run: Callable[[], object]) -> Cost:
    """The parameters of ``module``, and torch's count of what ``run`` computes for one image."""
    with FlopCounterMode(display=False) as counter:
        run()
    return Cost(sum(p.numel() for p in module.parameters()), counter.get_total_flops() // 2)


def model_record(config: ModelConfig) -> dict[str, Any]:
    """Costs as JSON, by part and in all, for one image and one forward.

    Raises AssertionError if formula and counter differ.
    """
    costs = dit_cost(config)
    costs["attention"] = costs["attention_linear"] + costs["attention_core"]
    parts = {name: costs[name] for name in PARTS}
    with torch.device("meta"):
        model = DiT(config).eval().requires_grad_(False)
        x = torch.empty(1, config.in_channels, config.input_size, config.input_size)
        index = torch.empty(1, dtype=torch.long)
    formula, seen = total(parts), counted(model, lambda: model(x, index, index))
    if abs(seen.macs - formula.macs) > TOLERANCE * formula.macs:
        raise AssertionError(f"formula {formula.macs} MACs, torch counts {seen.macs}")
    record = {name: asdict(cost) | {"flops": cost.flops} for name, cost in parts.items()}
    return {"parts": record, "total": _record(formula, seen)}


def decoder_record(config: VAEConfig, latent_side: int) -> dict[str, Any]:
    """The cost of `AutoencoderKL.decode` as JSON, for latents of ``latent_side``²."""
    with torch.device("meta"):
        vae = AutoencoderKL(config).eval().requires_grad_(False)
        z = torch.empty(1, config.latent_channels, latent_side, latent_side)
    return _record(counted(nn.ModuleList([vae.post_quant_conv, vae.decoder]),
                           lambda: vae.decode(z)))  # fmt: skip


def _record(cost: Cost, seen: Cost | None = None) -> dict[str, Any]:
    return asdict(cost) | {"flops": cost.flops, "counted_flops": (seen or cost).flops}


def make_unet() -> Any:
    """LDM-4: latents (N, 3, 64, 64), time steps (N,), encoder_hidden_states (N, 1, 512) → latents.

    Its published configuration in diffusers' UNet2DConditionModel, with random weights.
    """
    try:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'dit-engine[diffusers]'") from error
    return UNet2DConditionModel(
        sample_size=UNET_SHAPE[1],
        in_channels=UNET_SHAPE[0],
        out_channels=UNET_SHAPE[0],
        block_out_channels=(192, 384, 576, 960),
        layers_per_block=2,
        cross_attention_dim=CONTEXT,
        attention_head_dim=1,  # diffusers takes it for the number of heads
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
    )


@functools.cache
def unet_cost() -> Cost:
    """The U-Net's cost without its table of classes. Raises ImportError without diffusers."""
    with torch.device("meta"):
        unet = make_unet().requires_grad_(False)
        x, t, context = torch.empty(1, *UNET_SHAPE), torch.empty(1), torch.empty(1, 1, CONTEXT)
    return counted(unet, lambda: unet(x, t, encoder_hidden_states=context))


def gflops_report(sizes: tuple[int, ...] = SIZES) -> Report:
    """The published cost (None if there is none), our formula and torch's count."""
    report = new_report("gflops", describe(torch.device("cpu")), {"source": SOURCE})
    rows = report["rows"]
    for size in sizes:
        for name, (gflops, millions) in PAPER.items():
            config = ModelConfig.named(name, size)
            table = config.num_tokens * config.hidden_size  # the position table, not trained
            published = gflops if size == 256 else GFLOPS_512.get(name)
            rows.append(_row(name, size, model_record(config), published, millions, table))
    for size in sizes:
        record = {"total": decoder_record(VAEConfig(), size // 8)}
        rows.append(_row("VAE decoder (Stable Diffusion)", size, record))
    try:
        record = {"total": _record(unet_cost())}
        rows.append(_row(UNET, 256, record, UNET_GFLOPS, UNET_MILLIONS))
    except ImportError as error:
        rows.append({"section": "cost", "case": UNET, "contender": "", "size": 256,
                     "status": "skipped", "reason": str(error)})  # fmt: skip
    report["complete"] = True
    return report


def _row(
    name: str, size: int, record: dict[str, Any], gflops: float | None = None,
    millions: float | None = None, untrained: int = 0,
) -> Row:  # fmt: skip
    total = record["total"] | {"trained_parameters": record["total"]["parameters"] - untrained}
    return {
        "section": "cost", "case": name, "contender": "formula and torch's count", "status": "ok",
        "model": name, "size": size, "published_gflops": gflops,
        "published_million_parameters": millions, "parts": {}, **record, "total": total,
    }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--size", type=int, nargs="+", choices=SIZES, default=list(SIZES), help="pixels")
    add("--wide", action="store_true", help="all columns, wider than the terminal")
    add("--json", type=Path, nargs="?", const=STDOUT, metavar="FILE", help="as JSON")


def run(arguments: argparse.Namespace) -> int:
    from dit_bench.outputs import check_outputs
    from dit_bench.report import write
    from dit_bench.show.reports import report_tables
    from dit_bench.show.tables import show

    check_outputs([arguments.json])
    report = gflops_report(tuple(dict.fromkeys(arguments.size)))
    if arguments.json != STDOUT:
        show(report_tables(report), wide=arguments.wide)
    write(report, arguments.json)
    return 0
