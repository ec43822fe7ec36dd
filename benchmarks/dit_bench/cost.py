"""Parameters and arithmetic of a DiT and of a VAE's decoder, by formula.

A MAC is one multiply-add of a matrix product or convolution: what the DiT paper (arXiv
2212.09748) calls a flop, so that its "118.6 Gflops" for XL/2 are GMACs. True FLOPs are twice
that. Elementwise work (norms, activations, softmax, modulation, biases) is not counted.

Letters: T tokens, D hidden size, C channels, k kernel side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dit_engine.config import ModelConfig
from dit_engine.model import FREQUENCY_EMBEDDING_SIZE, DiT
from dit_engine.vae import AutoencoderKL, VAEConfig

CONDITIONS = ("conditioning", "adaln")
"""Parts of a network that depend on time step and label alone."""
TOLERANCE = 1e-3
"""Formula and counter may differ by so much."""


@dataclass(frozen=True)
class Cost:
    """Of one part of a network, for one image and one forward pass."""

    parameters: int = 0
    macs: int = 0

    @property
    def flops(self) -> int:
        """Additions and multiplications counted apart."""
        return 2 * self.macs

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.macs + other.macs)

    def __mul__(self, times: int) -> Cost:
        """The cost of ``times`` such parts, each with weights of its own."""
        return Cost(self.parameters * times, self.macs * times)


def total(parts: Mapping[str, Cost] | Iterable[Cost]) -> Cost:
    """The sum of all parts."""
    costs = parts.values() if isinstance(parts, Mapping) else parts
    return sum(costs, Cost())


def linear(inputs: int, outputs: int, rows: int) -> Cost:
    """A linear layer with bias, applied to ``rows`` vectors."""
    return Cost((inputs + 1) * outputs, inputs * outputs * rows)


def convolution(inputs: int, outputs: int, kernel: int, side: int) -> Cost:
    """A square convolution with bias whose output is side × side."""
    weights = inputs * outputs * kernel * kernel
    return Cost(weights + outputs, weights * side * side)


def attention_core(tokens: int, width: int) -> Cost:
    """QKᵀ and the weighted sum of V, all heads together: 2·T²·D MACs, no parameters."""
    return Cost(macs=2 * tokens * tokens * width)


def dit_cost(config: ModelConfig) -> dict[str, Cost]:
    """Costs of a DiT's parts, whose parameters sum to those of `dit_engine.model.DiT`.

    "patch_embed" holds the frozen position table; "conditioning" is the embedding of time step
    and label; "adaln" holds the modulations of every block and of the final layer. Both of these
    depend on nothing but (t, y), so a sampler may compute them before its loop.
    """
    d, t, depth = config.hidden_size, config.num_tokens, config.depth
    patch = config.patch_size**2
    return {
        "patch_embed": linear(config.in_channels * patch, d, t) + Cost(parameters=t * d),
        "conditioning": linear(FREQUENCY_EMBEDDING_SIZE, d, 1)
        + linear(d, d, 1)
        + Cost(parameters=config.label_rows * d),
        "adaln": linear(d, 6 * d, 1) * depth + linear(d, 2 * d, 1),
        "attention_linear": (linear(d, 3 * d, t) + linear(d, d, t)) * depth,
        "attention_core": attention_core(t, d) * depth,
        "mlp": (linear(d, config.mlp_hidden_size, t) + linear(config.mlp_hidden_size, d, t))
        * depth,
        "final": linear(d, patch * config.out_channels, t),
    }


def vae_decoder_cost(config: VAEConfig, latent_side: int) -> dict[str, Cost]:
    """Costs of `AutoencoderKL.decode`'s parts for latents of ``latent_side``²: post_quant_conv
    and decoder.

    Raises ValueError for a side below 1.
    """
    if latent_side < 1:
        raise ValueError(f"latent_side {latent_side} is not a positive number of latent pixels")
    widths, side = config.block_out_channels[::-1], latent_side
    parts = {
        "post_quant_conv": convolution(config.latent_channels, config.latent_channels, 1, side),
        "conv_in": convolution(config.latent_channels, widths[0], 3, side),
        "mid_resnets": _resnet(widths[0], widths[0], side) * 2,
    }
    if config.mid_block_add_attention:
        width, tokens = widths[0], side * side
        parts["mid_attention"] = (
            linear(width, width, tokens) * 4 + attention_core(tokens, width) + _group_norm(width)
        )
    before = widths[0]
    for i, width in enumerate(widths):
        level = _resnet(before, width, side) + _resnet(width, width, side) * config.layers_per_block
        if i < len(widths) - 1:
            side *= 2
            level += convolution(width, width, 3, side)
        parts[f"up_block_{i}"] = level
        before = width
    parts["conv_out"] = _group_norm(before) + convolution(before, config.out_channels, 3, side)
    return parts


def _group_norm(channels: int) -> Cost:
    return Cost(parameters=2 * channels)


def _resnet(inputs: int, outputs: int, side: int) -> Cost:
    cost = _group_norm(inputs) + convolution(inputs, outputs, 3, side)
    cost += _group_norm(outputs) + convolution(outputs, outputs, 3, side)
    return cost + (convolution(inputs, outputs, 1, side) if inputs != outputs else Cost())


def model_parts(config: ModelConfig) -> dict[str, Cost]:
    """`dit_cost` with the two halves of attention in one."""
    parts = dit_cost(config)
    attention = parts.pop("attention_linear") + parts.pop("attention_core")
    order = ("patch_embed", "conditioning", "adaln", "attention", "mlp", "final")
    parts["attention"] = attention
    return {name: parts[name] for name in order}


def count_model(config: ModelConfig) -> dict[str, int]:
    """True FLOPs of one forward of one image by part, counted on tensors without storage."""
    with torch.device("meta"):
        model = DiT(config).eval().requires_grad_(False)
        x = torch.empty(1, config.in_channels, config.input_size, config.input_size)
        index = torch.empty(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(x, index, index)
    found = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}

    def of(ending: str) -> int:
        return sum(v for k, v in found.items() if k.startswith("DiT.") and k.endswith(ending))

    return {
        "patch_embed": found["DiT.x_embedder"],
        "conditioning": found["DiT.t_embedder"],
        "adaln": of(".adaLN_modulation"),
        "attention": of(".attn"),
        "mlp": of(".mlp") - found["DiT.t_embedder.mlp"],
        "final": found["DiT.final_layer.linear"],
    }


def count_decoder(config: VAEConfig, latent_side: int) -> int:
    """True FLOPs of one decode of one image."""
    with torch.device("meta"):
        vae = AutoencoderKL(config).eval().requires_grad_(False)
        z = torch.empty(1, config.latent_channels, latent_side, latent_side)
    with FlopCounterMode(display=False) as counter:
        vae.decode(z)
    return counter.get_total_flops()


def model_record(config: ModelConfig) -> dict[str, Any]:
    """Costs as JSON, by part and in all, of one image and one forward."""
    parts, seen = model_parts(config), count_model(config)
    return {
        "parts": {name: _record(cost, seen[name]) for name, cost in parts.items()},
        "total": _record(total(parts), sum(seen.values())),
    }


def decoder_record(config: VAEConfig, latent_side: int) -> dict[str, Any]:
    return _record(total(vae_decoder_cost(config, latent_side)), count_decoder(config, latent_side))


def _record(cost: Cost, counted_flops: int) -> dict[str, Any]:
    if abs(counted_flops - cost.flops) > TOLERANCE * cost.flops:
        raise AssertionError(f"formula {cost.flops} FLOPs, torch counts {counted_flops}")
    return asdict(cost) | {"flops": cost.flops, "counted_flops": counted_flops}


def needed_weights(config: ModelConfig) -> int:
    """Parameters that every forward must read. Those of the conditioning, a third of the model, are
    left out: a sampler may compute it before its loop. They would flatter whoever never reads them.
    """
    parts = dit_cost(config)
    return sum(part.parameters for name, part in parts.items() if name not in CONDITIONS)
