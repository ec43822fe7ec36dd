"""Train a DiT on the latents of a trained autoencoder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_engine.config import ModelConfig
from dit_engine.model import DiT
from dit_engine.training.loop import LoopSettings, M, Trainer
from dit_engine.training.loss import DiffusionLoss

LABEL_DROPOUT = 0.1


def train_dit(
    latents: tuple[Tensor, Tensor], labels: Tensor, config: ModelConfig, settings: LoopSettings,
    directory: Path, batch_size: int, sheet: Callable[[DiT, Path], None] | None,
    device: torch.device | str,
) -> DiT:  # fmt: skip
    """Train on ``latents`` = (means, deviations), each (N, C, S, S), and return the EMA model.

    Labels (N,) are replaced by the null class with probability 0.1, so that the model also learns
    the unconditional half of classifier-free guidance (Ho & Salimans 2022).

    Raises ValueError for a config with another diffusion than the published one.
    """
    if changed := config.diffusion.to_dict():
        raise ValueError(f"training is of the published diffusion only, not of {changed}")
    torch.manual_seed(settings.seed)
    model = DiT(config)
    model.initialize_weights()
    return train_denoiser(
        model.to(device), config.null_class, latents, labels, settings, directory, batch_size, sheet
    )


def train_denoiser(
    model: M, null_class: int, latents: tuple[Tensor, Tensor], labels: Tensor,
    settings: LoopSettings, directory: Path, batch_size: int,
    sheet: Callable[[M, Path], None] | None = None,
) -> M:  # fmt: skip
    """`train_dit` for any network x (N, C, S, S), t (N,), y (N,) → (N, C or 2C, S, S)."""
    device = next(model.parameters()).device
    diffusion = DiffusionLoss(device)
    means, deviations = latents

    def loss(model: M, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(means), (batch_size,), generator=generator)
        jitter = torch.randn((batch_size, *means.shape[1:]), generator=generator)
        x0 = (means[chosen].float() + deviations[chosen].float() * jitter).to(device)
        dropped = torch.rand(batch_size, generator=generator) < LABEL_DROPOUT
        y = labels[chosen].masked_fill(dropped, null_class).to(device)
        t = torch.randint(diffusion.steps, (batch_size,), generator=generator).to(device)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        return diffusion(lambda xt, t: forward_bf16(model, xt, t, y), x0, t, noise)

    return Trainer(model, loss, settings, directory, sheet).run("transformer")


def forward_bf16(model: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The model's output, computed in bfloat16; the gradients reach its float32 weights.

    This is faster than autocast, which converts activations again and again. On the CPU, attention
    is computed as plain products, because the fused one's backward pass is slow for few tokens.
    """
    rounded = {name: weight.to(torch.bfloat16) for name, weight in model.named_parameters()}
    on_cpu = x.device.type == "cpu"
    with sdpa_kernel(SDPBackend.MATH) if on_cpu else contextlib.nullcontext():
        return functional_call(model, rounded, (x.to(torch.bfloat16), t, y))
