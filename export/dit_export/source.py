"""The source of a command: a model that is loaded and exported, or an export that is given."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from dit_engine.checkpoint import build_model, build_vae, load_checkpoint
from dit_engine.config import PUBLISHED, ModelConfig
from dit_engine.console.parser import add_loading_arguments, loading_options
from dit_engine.model import DiT
from dit_engine.vae import AutoencoderKL
from dit_export.bundle import Bundle

_SHAPE = ("depth", "hidden_size", "num_heads", "patch_size")


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
    """Load the model of --model. Raises a one-line ValueError or OSError as `load_checkpoint`."""
    name, checkpoint = arguments.model, arguments.checkpoint
    sized = name in PUBLISHED and not Path(name).exists()
    if sized and checkpoint is None:
        raise ValueError(f"--model {name} is a size: give its weights with --checkpoint")
    if checkpoint is not None and not sized:
        raise ValueError(f"--model {name}: with --checkpoint it is one of {', '.join(PUBLISHED)}")
    loaded = load_checkpoint(checkpoint or name, **loading_options(arguments))
    if sized and _shape(loaded.config) != _shape(ModelConfig.named(name)):
        raise ValueError(f"{checkpoint}: no {name}; it has {_shape(loaded.config)}")
    return Source(build_model(loaded), build_vae(loaded), loaded.label_names)


def _shape(config: ModelConfig) -> dict[str, int]:
    return {key: getattr(config, key) for key in _SHAPE}


def model_name(config: ModelConfig) -> str:
    """ "DiT-XL/2" for a published shape, else DiT-<depth>x<width>/<patch>."""
    for name in PUBLISHED:
        if _shape(replace(ModelConfig.named(name), patch_size=config.patch_size)) == _shape(config):
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


def given_export(arguments: argparse.Namespace) -> Bundle:
    """The export of --onnx. Raises ValueError for an option that contradicts the export or names
    another model."""
    bundle = Bundle.open(arguments.onnx)
    facts = {
        "dtype": bundle.dtype,
        "opset": bundle.opset,
        "guidance_channels": bundle.guided_channels,
        "numerics": bundle.config.numerics,
        "num_heads": bundle.config.num_heads,
        "prediction": bundle.config.diffusion.prediction,
    }
    for name, fact in facts.items():
        if getattr(arguments, name, fact) != fact:
            said = f"{getattr(arguments, name)}: the export {bundle.path} has {fact}"
            refuse(arguments, [name], said)
    models = ["model", "checkpoint", "vae", "vae_scaling_factor", "vae_shift_factor", "vae_groups"]
    refuse(arguments, models, "is not for --onnx, which names a finished export")
    return bundle


def refuse(arguments: argparse.Namespace, names: Iterable[str], reason: str) -> None:
    """Raise ValueError for the first of ``names`` that was given; reason: why it cannot apply."""
    for name in names:
        if name in arguments.given:
            raise ValueError(f"{arguments.given[name]} {reason}")
