"""A whole training: the autoencoder, the transformer, and perhaps the decoder again.

Each finished stage is kept on disk, so that the same call again goes on from there.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_engine.arguments import shown
from dit_engine.checkpoint import save_pretrained
from dit_engine.checkpoint.weights import load_into
from dit_engine.config import ModelConfig
from dit_engine.engine import Engine
from dit_engine.io.files import atomic_path, save_tensors
from dit_engine.io.json_files import parse_json, read_json
from dit_engine.io.provenance import recorded, same_source
from dit_engine.labels import resolve_labels
from dit_engine.model import DiT
from dit_engine.runtime import bfloat16_why_not, limited_threads, parse_device
from dit_engine.training.avatars import CLASSES, load_avatars
from dit_engine.training.card import Outcome, judge, write_card
from dit_engine.training.data import ImageSet, load_image_folder
from dit_engine.training.dit_stage import train_dit
from dit_engine.training.log import save_sheet
from dit_engine.training.loop import Budget, LoopSettings, read_stage
from dit_engine.training.vae_stage import encode_all, read_latents, train_decoder, train_vae
from dit_engine.vae import AutoencoderKL, VAEConfig

VAE_EMA_DECAY = 0.998
_LARGEST_SEED = 2**42  # each step's seed is about a million times this, and must fit into 64 bits


@dataclass(frozen=True)
class TrainSettings:
    """Everything about a training except its budgets. A resumed training must have the same.

    data: "avatars", or a folder with one directory of images per class; vae_channels: the widths of
    the autoencoder's levels, between which it downsamples by 2; the other fields are those of
    `ModelConfig` and of the optimiser.
    """

    data: str = "avatars"
    size: int = 64
    images_per_class: int = 3200
    vae_channels: tuple[int, ...] = (32, 64, 64)
    vae_batch_size: int = 16
    vae_learning_rate: float = 1.5e-3
    kl_weight: float = 1e-4
    depth: int = 8
    hidden_size: int = 256
    num_heads: int = 4
    patch_size: int = 2
    batch_size: int = 64
    learning_rate: float = 8e-4
    ema_decay: float = 0.999
    flip: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        self.vae_config()
        self.model_config(1)
        counts = "images_per_class", "vae_batch_size", "batch_size"
        weights = "vae_learning_rate", "learning_rate", "kl_weight"
        for names, least, most, allowed in (
            (counts, 1, math.inf, "1 or more"),
            (weights, 0, sys.float_info.max, "0 or more"),
            (("ema_decay",), 0, 1, "0 to 1"),
            (("seed",), -_LARGEST_SEED, _LARGEST_SEED, f"{-_LARGEST_SEED} to {_LARGEST_SEED}"),
        ):
            for name in names:
                if not least <= getattr(self, name) <= most:
                    raise ValueError(f"{name} {getattr(self, name)}: allowed is {allowed}")

    def vae_config(self) -> VAEConfig:
        # A small network: one block per level, no attention.
        return VAEConfig(
            block_out_channels=self.vae_channels, layers_per_block=1, norm_num_groups=8,
            mid_block_add_attention=False, scaling_factor=1.0,
        )  # fmt: skip

    def model_config(self, num_classes: int) -> ModelConfig:
        f = self.vae_config().downsampling
        if self.size < 1 or self.size % (f * self.patch_size):
            raise ValueError(f"size {self.size} is not a multiple of {f * self.patch_size}")
        return ModelConfig(
            depth=self.depth, hidden_size=self.hidden_size, num_heads=self.num_heads,
            patch_size=self.patch_size, input_size=self.size // f, num_classes=num_classes,
        )  # fmt: skip


def train(
    settings: TrainSettings,
    vae_budget: Budget,
    dit_budget: Budget,
    directory: Path,
    device: torch.device | str | None = "cpu",
    decoder_budget: Budget | None = None,
    threads: int | None = None,
) -> tuple[Path, Outcome]:
    """Train a VAE, then a DiT, and write them into ``directory``.

    Called again with the same settings, it goes on from where it was stopped. Ctrl-C and SIGTERM
    raise `Stopped` or KeyboardInterrupt once a checkpoint is written. A warning, and README.md
    beside the model, say if the model is plainly not trained (`judge`).

    Args:
        device: "cpu", "cuda", …; None is CUDA if there is a GPU, otherwise the CPU.
        decoder_budget: trains the VAE's decoder again at the end; the latents stay as they are.
        threads: of the CPU. None takes what other programs leave free, but at most torch's own
            number; if the environment has OMP_NUM_THREADS, it takes that number.

    Returns:
        The directory for `Engine.from_pretrained`, and the outcome.

    Raises ValueError, before any file is read, for a device that does not exist and for a GPU
    before Ampere, because networks are trained in bfloat16.
    """
    device = parse_device(device)
    if (reason := bfloat16_why_not(device)) is not None:
        raise ValueError(f"training is in bfloat16: {reason}; device 'cpu' has it")
    follow_load = threads is None and "OMP_NUM_THREADS" not in os.environ

    def loop(budget: Budget, learning_rate: float, decay: float, **more: Any) -> LoopSettings:
        options = {"ema_decay": decay, "seed": settings.seed, "follow_load": follow_load} | more
        return LoopSettings(budget, learning_rate, **options)

    with limited_threads(threads):
        data, flip = _begin(settings, directory)
        settings = replace(settings, flip=flip)
        vae_loop = loop(vae_budget, settings.vae_learning_rate, VAE_EMA_DECAY)
        vae = _stage_one(settings, vae_loop, data, directory / "vae", device)
        means, deviations, labels = _latents(settings, vae, data, directory / "latents.safetensors")
        model = train_dit(
            (means, deviations), labels, settings.model_config(len(data.class_names)),
            loop(dit_budget, settings.learning_rate, settings.ema_decay, warmup_steps=200),
            directory / "dit", settings.batch_size, _sheet_maker(vae, data.class_names), device,
        )  # fmt: skip
        if decoder_budget is not None:
            n = len(data)  # the latents of mirrored images follow
            vae = train_decoder(
                vae, data, (means[:n], deviations[:n]),
                loop(decoder_budget, settings.vae_learning_rate, VAE_EMA_DECAY,
                     seed=settings.seed + 1),
                directory / "decoder", settings.vae_batch_size,
            )  # fmt: skip
        finished = directory / "model"
        save_pretrained(finished, model, vae, data.class_names, dtype=torch.float16)
    transformer, autoencoder = (read_stage(directory / name) for name in ("dit", "vae"))
    outcome = judge(data, transformer, autoencoder, settings.ema_decay, VAE_EMA_DECAY)
    write_card(finished, data, outcome)
    if outcome.shortcomings:
        warnings.warn(
            f"{finished} is not trained: {'; '.join(outcome.shortcomings)}. With a larger budget "
            "the transformer goes on; for the autoencoder, begin again in another directory",
            stacklevel=2,
        )
    return finished, outcome


def is_begun(directory: Path) -> bool:
    """Whether ``directory`` holds anything from which a training can go on."""
    return (directory / "settings.json").exists() or any(directory.glob("data/*.npy"))


def _begin(settings: TrainSettings, directory: Path) -> tuple[ImageSet, tuple[str, ...]]:
    """The images, and the full names of the classes to flip. Writes settings.json, or checks that
    an earlier one is the same."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'dit-engine[train]'") from error
    begun = directory / "settings.json"
    told = asdict(settings) | {"data": recorded(settings.data)}
    _check_same(told, begun)  # before images are rendered or read
    if settings.data == "avatars":
        _flipped(settings.flip, CLASSES)  # likewise
        count, size = settings.images_per_class, settings.size
        data = load_avatars(directory / "data", "train", count, size)
    else:
        # A run that was begun with classes in another order goes on with it.
        earlier = _begun(begun)["class_names"] if begun.is_file() else ()
        data = load_image_folder(Path(settings.data), settings.size, earlier)
    flip = _flipped(settings.flip, data.class_names)
    now = told | {"class_names": data.class_names, "images": len(data)}
    _check_same(now, begun)
    if not begun.exists():
        begun.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(begun) as partial:
            partial.write_text(json.dumps(now, indent=2) + "\n")
    return data, flip


def _check_same(now: dict[str, Any], path: Path) -> None:
    """Raise ValueError if the run was begun earlier with other settings."""
    if not path.exists():
        return
    before = _begun(path)
    for name, value in parse_json(json.dumps(now), "these settings", lenient=True).items():
        # Earlier versions kept the path of the images.
        same = name == "data" and same_source(str(before.get(name)), value)
        if not same and before.get(name) != value:
            raise ValueError(
                f"{path.parent} holds a training with {name} {before.get(name)!r}, not {value!r}: "
                "resume it with what it began with, or use another directory"
            )


def _begun(path: Path) -> dict[str, Any]:
    """The settings with which the run was begun. Raises ValueError for a file of something else."""
    settings = read_json(path, lenient=True)  # the path of the images may not be valid UTF-8
    names = settings.get("class_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: class_names {shown(names)} is not a list of names")
    return settings


def _flipped(flip: Sequence[str], names: tuple[str, ...]) -> tuple[str, ...]:
    """The full names of the classes in ``flip``, which may be whatever `resolve_labels` takes."""
    try:
        return tuple(names[i] for i in resolve_labels(flip, len(names), names)) if flip else ()
    except ValueError as error:
        raise ValueError(f"flip: {error}") from None


def _stage_one(
    settings: TrainSettings, loop: LoopSettings, data: ImageSet, directory: Path,
    device: torch.device | str,
) -> AutoencoderKL:  # fmt: skip
    """The autoencoder: the finished one in ``directory``, or one that is trained now."""
    path = directory / "vae.safetensors"
    if path.exists():
        vae = AutoencoderKL(settings.vae_config())
        load_into(vae, path)
        return vae.to(device).to(memory_format=torch.channels_last).eval()  # pyright: ignore[reportCallIssue]
    vae = train_vae(
        data, settings.vae_config(), loop, directory, settings.vae_batch_size,
        settings.kl_weight, settings.flip, device,
    )  # fmt: skip
    save_tensors(vae.state_dict(), path)
    return vae


def _latents(
    settings: TrainSettings, vae: AutoencoderKL, data: ImageSet, path: Path
) -> tuple[Tensor, Tensor, Tensor]:
    """Means, deviations and labels of all images, and then of the mirrored ones."""
    if not path.exists():
        parts = [data]
        if settings.flip:
            chosen = [data.class_names[label] in settings.flip for label in data.labels]
            parts.append(ImageSet(data.images[chosen][:, :, ::-1], data.labels[chosen], ()))
        encoded = [(*encode_all(vae, part), torch.from_numpy(part.labels)) for part in parts]
        joined = (torch.cat(each) for each in zip(*encoded, strict=True))
        save_tensors(dict(zip(("means", "deviations", "labels"), joined, strict=True)), path)
    return read_latents(path, len(data.class_names))


def _sheet_maker(vae: AutoencoderKL, names: tuple[str, ...]) -> Callable[[DiT, Path], None]:
    """A function (transformer, path) that draws a sheet of images of all classes."""
    labels = [i % len(names) for i in range(max(16, 2 * len(names)))][:64]

    def sheet(model: DiT, path: Path) -> None:
        engine = Engine(model, vae, names, next(model.parameters()).device)
        images = engine.generate(
            labels, steps=20, sampler="dpm++", guidance_scale=2.0, seed=0, output="pt"
        ).images
        save_sheet(images * 2 - 1, path, columns=8)

    return sheet
