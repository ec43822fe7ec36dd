"""The model that is measured: a published size with random weights, or any checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from dit_engine.config import PUBLISHED, ModelConfig
from dit_engine.model import DiT, position_embedding
from dit_engine.vae import AutoencoderKL, VAEConfig

M = TypeVar("M", bound=nn.Module)
_SIZE = re.compile(r"(?:DiT-)?[A-Za-z]{1,3}[/-]\d+")


@dataclass(frozen=True)
class Subject:
    """A float32 model on the CPU, and the VAE that belongs to it.

    weights: "random", or where they came from. size: pixels along a side, if known.
    """

    name: str
    weights: str
    model: DiT
    vae: AutoencoderKL | None
    label_names: tuple[str, ...] | None = None
    size: int | None = None


def load_subject(
    name: str, *, size: int | None = None, vae: str | None = None, with_vae: bool = True
) -> Subject:
    """The model called ``name``: one of the twelve published sizes ("XL/2"), or what
    `Engine.from_pretrained` takes. Raises ValueError or OSError for a bad name or checkpoint.

    size: pixels along a side, only for a published size; None is 256. vae: weights of another VAE
    than the model's own. with_vae: whether a published size gets Stable Diffusion's (random) VAE.
    """
    from dit_engine.checkpoint import build_model, build_vae, load_checkpoint

    check_name(name, size, vae)
    if _is_size(name):
        size = size or 256
        model = random_model(ModelConfig.named(name, size))
        short = name.removeprefix("DiT-").replace("-", "/")
        return Subject(short, "random", model, random_vae(VAEConfig()) if with_vae else None,
                       size=size)  # fmt: skip
    checkpoint = load_checkpoint(name, vae=vae)
    model, own = build_model(checkpoint), build_vae(checkpoint)
    for module in filter(None, (model, own)):
        module.float().eval().requires_grad_(False)
    pixels = None if own is None else model.config.input_size * own.config.downsampling
    return Subject(name, checkpoint.source, model, own, checkpoint.label_names, pixels)


def check_name(name: str, size: int | None = None, vae: str | None = None) -> None:
    """Raise ValueError or OSError if the name or its options are wrong, before any work."""
    if _is_size(name):
        ModelConfig.named(name, size or 256)
        if vae is not None:
            raise ValueError(f"--vae is for checkpoints; {name!r} gets random weights")
        return
    if name != "builtin" and "/" not in name and not Path(name).exists():
        raise ValueError(
            f"model {name!r} is unknown; choose builtin, one of {', '.join(PUBLISHED)}, "
            "a file, a directory or a hub id"
        )
    if size is not None:
        raise ValueError(f"--size is for published models; {name!r} has its own")


def _is_size(name: str) -> bool:
    return _SIZE.fullmatch(name) is not None and not Path(name).exists()


def in_numerics(model: DiT, numerics: str) -> DiT:
    """``model`` itself if its numerics are these, else a module of these on its tensors."""
    from dit_engine.checkpoint.convert import with_numerics

    config = with_numerics(model.config, numerics)
    return model if config == model.config else twin(model, config)


def twin(model: DiT, config: ModelConfig | None = None) -> DiT:
    """Another module on the tensors of ``model``."""
    with torch.device("meta"):
        made = DiT(config or model.config)
    made.load_state_dict(model.state_dict(), assign=True)
    return made.eval().requires_grad_(False)


def random_model(config: ModelConfig) -> DiT:
    """A float32 DiT whose every weight is random, in eval mode."""
    model = _empty(lambda: DiT(config))
    side = config.input_size // config.patch_size
    with torch.no_grad():
        model.pos_embed.copy_(position_embedding(config.hidden_size, side))
    return _randomised(model)


def random_vae(config: VAEConfig) -> AutoencoderKL:
    """Random weights; the norms' scales lie around one, as a trained network's do."""
    vae = _randomised(_empty(lambda: AutoencoderKL(config)))
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.add_(1)
    return vae


def _empty(make: Callable[[], M]) -> M:
    """The module with any numbers: torch's own initialisation takes longer than `_randomised`."""
    with torch.device("meta"):
        module = make()
    return module.to_empty(device="cpu")


def _randomised(module: M) -> M:
    """The module with random weights, adaLN's too (with their initial zeros, blocks do nothing).

    Embedders are large, so that a wrong time step or label shows above the rounding of bf16.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        scale = 0.5 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        if name.startswith("t_embedder") and parameter.ndim > 1:
            scale *= 4
        with torch.no_grad():
            if name != "pos_embed":
                std = 1.0 if name.startswith("y_embedder") else scale
                parameter.normal_(std=std, generator=generator)
    return module.eval().requires_grad_(False)
