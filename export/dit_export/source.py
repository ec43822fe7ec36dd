"""What a command is about: a model that is loaded to be exported, or an export that is given."""

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


def given_export(arguments: argparse.Namespace) -> Bundle:
    """The export of --onnx. Raises ValueError for an option that says something else than it.

    If --model or --checkpoint is given, that model is compared with the export. Otherwise, options
    that need a model are refused.
    """
    path: Path = arguments.onnx
    bundle = Bundle.open(path)
    facts = {
        "dtype": bundle.dtype,
        "opset": bundle.opset,
        "guidance_channels": bundle.guided_channels,
        "numerics": bundle.config.numerics,
        "num_heads": bundle.config.num_heads,
    }
    for name, fact in facts.items():
        if getattr(arguments, name, fact) != fact:
            refuse(arguments, [name], f"{getattr(arguments, name)}: the export {path} has {fact}")
    if {"model", "checkpoint"} & arguments.given.keys():
        _check_source(bundle, load_source(arguments), arguments)
    else:
        names = ["vae", "vae_scaling_factor", "vae_shift_factor", "vae_groups"]
        refuse(arguments, names, "beside --onnx needs --model, with which the export is compared")
    return bundle


def _check_source(bundle: Bundle, source: Source, arguments: argparse.Namespace) -> None:
    path, config, vae = bundle.path, source.model.config, source.vae
    if weights_hash(source.model) != bundle.checkpoint:
        raise ValueError(f"{path}: is an export of another model than --model {arguments.model}")
    if config != bundle.config:
        ours, theirs = config.to_dict(), bundle.config.to_dict()
        names = [n for n in sorted({*theirs, *ours}) if ours.get(n) != theirs.get(n)]
        difference = ", ".join(f"{n} {theirs.get(n)!r} and not {ours.get(n)!r}" for n in names)
        raise ValueError(f"{path}: is an export of --model {arguments.model} with {difference}")
    if source.label_names != bundle.label_names:
        difference = _label_difference(bundle.label_names, source.label_names)
        raise ValueError(f"{path}: is an export of --model {arguments.model} with {difference}")
    if vae is None:
        return
    if bundle.vae is None:
        refuse(arguments, ["vae"], f"{arguments.vae}: the export {path} has no VAE")
    elif vae.config != bundle.vae or weights_hash(vae) != bundle.vae_checkpoint:
        owner = "--model" if arguments.vae is None else "--vae"
        name = arguments.model if arguments.vae is None else arguments.vae
        raise ValueError(f"{path}: is an export with another VAE than that of {owner} {name}")


def _label_difference(theirs: tuple[str, ...] | None, ours: tuple[str, ...] | None) -> str:
    """How label names differ; each is None or has one name per class."""
    if theirs is None or ours is None:
        return f"{'no' if theirs is None else 'other'} label names"
    i = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
    return f"label {i} {theirs[i]!r} and not {ours[i]!r}"


def refuse(arguments: argparse.Namespace, names: Iterable[str], reason: str) -> None:
    """Raise ValueError for the first of ``names`` that was given; reason: why it cannot apply."""
    for name in names:
        if name in arguments.given:
            raise ValueError(f"{arguments.given[name]} {reason}")
