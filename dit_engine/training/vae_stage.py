"""Train an AutoencoderKL whose latents have mean 0 and variance 1, and later its decoder alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dit_engine.arguments import shown
from dit_engine.checkpoint.weights import read_weights
from dit_engine.console.bars import Bar
from dit_engine.training.data import ImageSet
from dit_engine.training.log import save_sheet
from dit_engine.training.loop import LoopSettings, Trainer
from dit_engine.vae import AutoencoderKL, VAEConfig


def train_vae(
    data: ImageSet, config: VAEConfig, settings: LoopSettings, directory: Path,
    batch_size: int, kl_weight: float, flip: Sequence[str], device: torch.device | str,
) -> AutoencoderKL:  # fmt: skip
    """Train on ``data`` and return the normalised EMA model (float32, eval mode).

    flip: classes whose images are mirrored half of the time.
    """
    torch.manual_seed(settings.seed)
    vae = AutoencoderKL(config).to(device)
    vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    may_flip = torch.tensor([name in flip for name in data.class_names])[data.labels]  # (N,)

    def loss(model: AutoencoderKL, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(data), (batch_size,), generator=generator)
        images = data.tensor(chosen.numpy())
        mirrored = may_flip[chosen] & (torch.rand(batch_size, generator=generator) < 0.5)
        images[mirrored] = images[mirrored].flip(-1)
        return vae_loss(model, images.to(device), generator, kl_weight)

    sheet = _sheet_maker(data, lambda model, images, _: model.encode(images.to(device))[0])
    trained = Trainer(vae, loss, settings, directory, sheet).run("autoencoder")
    normalise_latents(trained, data)
    return trained


def train_decoder(
    vae: AutoencoderKL, data: ImageSet, latents: tuple[Tensor, Tensor], settings: LoopSettings,
    directory: Path, batch_size: int,
) -> AutoencoderKL:  # fmt: skip
    """Train ``vae``'s decoder alone and return the EMA model (float32, eval mode).

    The latents stay as they are, so a transformer that was trained on them stays usable, as with
    the fine-tuned decoders of Stable Diffusion (stabilityai/sd-vae-ft-mse).

    latents: means and deviations (N, c, h, w) of the encoder on ``data``'s images, in order.
    """
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    means, deviations = latents
    device = vae.quant_conv.weight.device

    def loss(model: AutoencoderKL, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(data), (batch_size,), generator=generator)
        images = data.tensor(chosen.numpy()).to(device)
        noise = torch.randn(batch_size, *means.shape[1:], generator=generator)
        z = means[chosen].float() + deviations[chosen].float() * noise
        with torch.autocast(device.type, torch.bfloat16):
            rebuilt = model.decode(z.to(device)).float()
        return reconstruction_losses(rebuilt, images)

    sheet = _sheet_maker(data, lambda _model, _images, shown: means[shown].float().to(device))
    return Trainer(vae.train(), loss, settings, directory, sheet).run("decoder")


def _sheet_maker(
    data: ImageSet, encode: Callable[[AutoencoderKL, Tensor, np.ndarray], Tensor]
) -> Callable[[AutoencoderKL, Path], None]:
    """A function (model, path) that draws 32 images of ``data``, and below each row of them what
    the model makes of these images. encode: (model, images, their indices) → latents."""
    shown = np.linspace(0, len(data) - 1, 32).astype(int)
    examples = data.tensor(shown)

    def sheet(model: AutoencoderKL, path: Path) -> None:
        with torch.no_grad():
            rebuilt = model.decode(encode(model, examples, shown)).cpu()
        rows = [t for pair in zip(examples.split(8), rebuilt.split(8), strict=True) for t in pair]
        save_sheet(torch.cat(rows), path, columns=8)

    return sheet


def vae_loss(
    vae: AutoencoderKL, images: Tensor, generator: torch.Generator, kl_weight: float
) -> dict[str, Tensor]:
    """`reconstruction_losses` and the weighted KL to N(0, 1); images (N, 3, S, S) in [-1, 1]."""
    with torch.autocast(images.device.type, torch.bfloat16):
        mean, log_variance = (t.float() for t in vae.encode(images))
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        rebuilt = vae.decode(mean + (0.5 * log_variance).exp() * noise).float()
    losses = reconstruction_losses(rebuilt, images)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
    return losses | {"loss": losses["loss"] + kl_weight * kl, "kl": kl}


def reconstruction_losses(rebuilt: Tensor, images: Tensor) -> dict[str, Tensor]:
    """The absolute error of pixels, plus half the absolute error of the differences between
    neighbouring pixels: without this term, edges stay soft."""
    error = rebuilt - images
    pixel = error.abs().mean()
    edge = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return {"loss": pixel + 0.5 * edge, "pixel": pixel, "edge": edge}


@torch.no_grad()
def encode_all(vae: AutoencoderKL, data: ImageSet, batch_size: int = 128) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of the latents of every image, float16 (N, c, h, w)."""
    device = next(vae.parameters()).device
    means, deviations = [], []
    for start in Bar(range(0, len(data), batch_size), "encoding"):
        chosen = np.arange(start, min(start + batch_size, len(data)))
        images = data.tensor(chosen).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            mean, log_variance = vae.encode(images)
        means.append(mean.half().cpu())
        deviations.append((0.5 * log_variance.float()).exp().half().cpu())
    return torch.cat(means).contiguous(), torch.cat(deviations).contiguous()


def read_latents(path: Path, classes: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Means and deviations (N, c, s, s) and int64 labels (N,) from a file that a training wrote.

    Raises a one-line ValueError that names the path for any other file, and for labels outside 0 to
    ``classes`` - 1 (or N - 1 if ``classes`` is None).
    """
    tensors = read_weights(path)
    if missing := {"means", "deviations", "labels"} - tensors.keys():
        raise ValueError(f"{path} holds no {min(missing)}; latents of dit-train are needed")
    means, deviations, labels = tensors["means"], tensors["deviations"], tensors["labels"]
    right = means.ndim == 4 and means.numel() > 0 and means.shape[2] == means.shape[3]
    if not right or deviations.shape != means.shape or labels.shape != means.shape[:1]:
        raise ValueError(
            f"{path} holds means {shown(means)}, deviations {shown(deviations)} and labels "
            f"{shown(labels)}; (N, c, s, s) twice and (N,) are needed"
        )
    last = (classes or len(labels)) - 1
    if labels.dtype != torch.int64 or labels.min() < 0 or labels.max() > last:
        raise ValueError(f"{path} holds labels that are not integers from 0 to {last}")
    return means, deviations, labels


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, data: ImageSet, images: int = 2048) -> None:
    """Fold each latent channel's mean and deviation into the two 1×1 convolutions.

    Afterwards each channel of the latents of ``data`` has mean 0 and variance 1 (so
    ``scaling_factor`` is 1), and images decode as before.
    """
    chosen = np.linspace(0, len(data) - 1, min(images, len(data))).astype(int)
    device = vae.quant_conv.weight.device
    batches = [vae.encode(data.tensor(part).to(device))[0] for part in np.array_split(chosen, 32)]
    mean = torch.cat(batches).mean(dim=(0, 2, 3))  # (c,)
    std = torch.cat(batches).std(dim=(0, 2, 3))  # (c,)
    c = len(mean)
    before, after = vae.quant_conv, vae.post_quant_conv
    assert before.bias is not None and after.bias is not None
    before.weight[:c] /= std.view(-1, 1, 1, 1)
    before.bias[:c] = (before.bias[:c] - mean) / std
    before.bias[c:] -= 2 * std.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std.view(1, -1, 1, 1)
