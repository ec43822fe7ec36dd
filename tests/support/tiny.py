"""Small random models for tests that are about plumbing and not about pictures."""

from __future__ import annotations

import torch

from dit_engine.config import ModelConfig
from dit_engine.engine import Engine
from dit_engine.model import DiT
from dit_engine.vae import AutoencoderKL, VAEConfig

NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibex", "jay")


def tiny_dit(seed: int = 0, **overrides: object) -> DiT:
    """Two blocks of width 48 on 8×8 latents, every weight random (adaLN-Zero would hide bugs)."""
    values = {"depth": 2, "hidden_size": 48, "num_heads": 2, "patch_size": 2, "input_size": 8}
    model = DiT(ModelConfig.from_dict(values | {"num_classes": len(NAMES)} | overrides))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            scale = 0.5 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model.eval()


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """Downsampling 2; wide enough for the convolution kernels that real models meet."""
    torch.manual_seed(seed)
    config = VAEConfig(block_out_channels=(32, 64), layers_per_block=1)
    return AutoencoderKL(config).eval()


def tiny_engine(vae: bool = True, names: bool = True, **options: object) -> Engine:
    return Engine(tiny_dit(), tiny_vae() if vae else None, NAMES if names else None,
                  device="cpu", **options)  # fmt: skip
