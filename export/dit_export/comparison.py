"""An export that was given, against the options beside it that say what it should be."""

from __future__ import annotations

import argparse
from pathlib import Path

from dit_export.bundle import Bundle
from dit_export.given import refuse
from dit_export.source import Source, load_source, weights_hash


def given_export(arguments: argparse.Namespace) -> Bundle:
    """The export of --onnx, which is what every other option says, or a ValueError that names one.

    The model's options are compared with the export where --model or --checkpoint is among them;
    without these, those that need a model are refused.
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
    """Of label names that differ, each None or one a class."""
    if theirs is None or ours is None:
        return f"{'no' if theirs is None else 'other'} label names"
    i = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
    return f"label {i} {theirs[i]!r} and not {ours[i]!r}"
