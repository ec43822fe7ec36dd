"""The costs of `dit_bench.cost` beside what torch's operator counter sees, part by part."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dit_bench.cost import Cost, dit_cost, total, vae_decoder_cost
from dit_engine.config import ModelConfig
from dit_engine.model import DiT
from dit_engine.vae import AutoencoderKL, VAEConfig

TOLERANCE = 1e-3
"""Formula and counter may differ by so much."""


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
