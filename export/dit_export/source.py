"""The model that is exported: loaded as every other command loads it, and named by its weights."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from dit_engine.checkpoint import build_model, build_vae, load_checkpoint
from dit_engine.config import PUBLISHED, ModelConfig
from dit_engine.console.parser import add_loading_arguments, loading_options
from dit_engine.model import DiT
from dit_engine.vae import AutoencoderKL


@dataclass(frozen=True)
class Source:
    model: DiT
    vae: AutoencoderKL | None
    label_names: tuple[str, ...] | None


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    sources = "file, directory, hub id or 'builtin'; or a size (DiT-XL/2) with --checkpoint"
    add("--model", default="builtin", help=sources)
    add("--checkpoint", help="the weights, where --model is a size: file, directory or hub id")
    add_loading_arguments(parser)


def load_source(arguments: argparse.Namespace) -> Source:
    """Raises ValueError and OSError of one line, as `load_checkpoint` does."""
    name, checkpoint = arguments.model, arguments.checkpoint
    sized = name in PUBLISHED and not Path(name).exists()
    if sized and checkpoint is None:
        raise ValueError(f"--model {name} is a size: give its weights with --checkpoint")
    if checkpoint is not None and not sized:
        raise ValueError(f"--model {name}: with --checkpoint it is one of {', '.join(PUBLISHED)}")
    loaded = load_checkpoint(checkpoint or name, **loading_options(arguments))
    if sized:
        _check_size(name, loaded.config, str(checkpoint))
    return Source(build_model(loaded), build_vae(loaded), loaded.label_names)


def _check_size(name: str, config: ModelConfig, checkpoint: str) -> None:
    named = ModelConfig.named(name)
    shape = ("depth", "hidden_size", "num_heads", "patch_size")
    if any(getattr(named, key) != getattr(config, key) for key in shape):
        found = ", ".join(f"{key} {getattr(config, key)}" for key in shape)
        raise ValueError(f"{checkpoint}: no {name}; it has {found}")


def model_name(config: ModelConfig) -> str:
    """ "DiT-XL/2" for a published shape, else DiT-<depth>x<width>/<patch>."""
    for name in PUBLISHED:
        named = replace(ModelConfig.named(name), patch_size=config.patch_size)
        fields = ("depth", "hidden_size", "num_heads")
        if all(getattr(named, f) == getattr(config, f) for f in fields):
            return f"{name.split('/')[0]}/{config.patch_size}"
    return f"DiT-{config.depth}x{config.hidden_size}/{config.patch_size}"


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of the state dict: names, dtypes, shapes and bytes, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().to("cpu").contiguous().view(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()
