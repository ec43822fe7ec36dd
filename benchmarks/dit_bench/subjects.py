"""The model that is measured: a published size with random weights, or any checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from dit_bench.cpu_forward import random_model
from dit_bench.cpu_vae import random_vae
from dit_engine.config import PUBLISHED, ModelConfig
from dit_engine.model import DiT
from dit_engine.vae import AutoencoderKL, VAEConfig

_SIZE = re.compile(r"(?:DiT-)?[A-Za-z]{1,3}[/-]\d+")


@dataclass(frozen=True)
class Subject:
    """A float32 model on the CPU, and the VAE that belongs to it.

    weights: "random", or where they came from. A forward takes as long with random ones.
    size: pixels along a side of an image, where that is known.
    """

    name: str
    weights: str
    model: DiT
    vae: AutoencoderKL | None
    label_names: tuple[str, ...] | None = None
    size: int | None = None

    @property
    def trained(self) -> bool:
        return self.weights != "random"


def load_subject(
    name: str,
    *,
    size: int | None = None,
    vae: str | None = None,
    with_vae: bool = True,
) -> Subject:
    """The model called ``name``.

    Args:
        name: one of the twelve published sizes ("XL/2"), or what `Engine.from_pretrained` takes.
        size: pixels along a side, of a published size only; None is 256.
        vae: weights of another VAE than the model's own.
        with_vae: whether a published size gets Stable Diffusion's VAE (random weights).

    Raises:
        ValueError, OSError: an unknown name, which lists the known ones, or a bad checkpoint.
    """
    if is_size(name):
        config = ModelConfig.named(name, size or 256)
        if vae is not None:
            raise ValueError(f"vae {vae!r} is for a checkpoint; {name!r} gets random weights")
        autoencoder = random_vae(VAEConfig()) if with_vae else None
        short = name.removeprefix("DiT-").replace("-", "/")
        return Subject(short, "random", random_model(config), autoencoder, size=size or 256)
    if size is not None:
        raise ValueError(f"size {size} is for a published model; {name!r} has its own")
    check_source(name)
    from dit_engine.checkpoint import build_model, build_vae, load_checkpoint

    checkpoint = load_checkpoint(name, vae=vae)
    model = build_model(checkpoint).float().eval().requires_grad_(False)
    own = build_vae(checkpoint)
    own = None if own is None else own.float().eval().requires_grad_(False)
    pixels = None if own is None else model.config.input_size * own.config.downsampling
    return Subject(name, checkpoint.source, model, own, checkpoint.label_names, pixels)


def in_numerics(model: DiT, numerics: str) -> DiT:
    """``model`` itself if it computes in ``numerics``, else a twin that does, on its tensors."""
    from dit_engine.checkpoint.convert import with_numerics

    config = with_numerics(model.config, numerics)
    if config == model.config:
        return model
    with torch.device("meta"):
        twin = DiT(config)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.eval().requires_grad_(False)


def is_size(name: str) -> bool:
    """Whether ``name`` looks like a published size, known or not, rather than a path."""
    return _SIZE.fullmatch(name) is not None and not Path(name).exists()


def check_source(name: str) -> None:
    """Raise a ValueError that lists what is known for what is no model, path or hub id."""
    if name != "builtin" and "/" not in name and not Path(name).exists():
        raise ValueError(
            f"model {name!r} is unknown; choose builtin, one of {', '.join(PUBLISHED)}, "
            "a file, a directory or a hub id"
        )


def check_name(name: str, size: int | None) -> None:
    """Raise what `load_subject` would raise for the name and the size, before any work."""
    if is_size(name):
        ModelConfig.named(name, size or 256)
    else:
        check_source(name)


def float_dtype(precision: str) -> torch.dtype:
    """Of the activations: bfloat16 among quantised products."""
    return {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)
