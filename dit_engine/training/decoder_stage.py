"""An optional stage: the VAE's decoder alone, trained on while the latents stay as they are.

A transformer that was trained on the encoder's latents keeps its worth, as with the fine-tuned
decoders of Stable Diffusion (stabilityai/sd-vae-ft-mse).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dit_engine.training.data import ImageSet
from dit_engine.training.loop import LoopSettings, Trainer
from dit_engine.training.sheets import save_sheet
from dit_engine.training.vae_stage import reconstruction_losses
from dit_engine.vae import AutoencoderKL


def train_decoder(
    vae: AutoencoderKL,
    data: ImageSet,
    latents: tuple[Tensor, Tensor],
    settings: LoopSettings,
    directory: Path,
    batch_size: int,
) -> AutoencoderKL:
    """Train ``vae``'s decoder on ``data`` and return the EMA model (float32, eval mode).

    latents: means and deviations (N, c, h, w) of the encoder on ``data``'s images, in order.
    """
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    means, deviations = latents
    device = vae.quant_conv.weight.device

    def loss(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        assert isinstance(model, AutoencoderKL)
        chosen = torch.randint(len(data), (batch_size,), generator=generator)
        images = data.tensor(chosen.numpy()).to(device).contiguous(
            memory_format=torch.channels_last
        )  # fmt: skip
        noise = torch.randn(batch_size, *means.shape[1:], generator=generator)
        z = means[chosen].float() + deviations[chosen].float() * noise
        with torch.autocast(device.type, torch.bfloat16):
            rebuilt = model.decode(z.to(device)).float()
        return reconstruction_losses(rebuilt, images)

    shown = np.linspace(0, len(data) - 1, 32).astype(int)
    examples = data.tensor(shown).to(device)

    def sheet(model: nn.Module, path: Path) -> None:
        assert isinstance(model, AutoencoderKL)
        with torch.no_grad():
            rebuilt = model.decode(means[shown].float().to(device))
        rows = [t for pair in zip(examples.split(8), rebuilt.split(8), strict=True) for t in pair]
        save_sheet(torch.cat(rows), path, columns=8)

    trained = Trainer(vae.train(), loss, settings, directory, sheet).run("decoder")
    assert isinstance(trained, AutoencoderKL)
    return trained
