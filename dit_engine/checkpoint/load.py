"""Read a model from any source: its config and official state dict, and the module made of them.

Weights are mapped from their file and assigned to a module that was built without storage, so the
model is never in memory twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from dit_engine.arguments import choice, positive, shown
from dit_engine.checkpoint.convert import (
    DIFFUSERS_CLASSES,
    DIFFUSERS_MARK,
    config_from_diffusers,
    model_shapes,
    state_from_diffusers,
    with_numerics,
)
from dit_engine.checkpoint.hub import locate, open_directory
from dit_engine.checkpoint.infer import count_blocks, infer_config
from dit_engine.checkpoint.options import options_of
from dit_engine.checkpoint.save import NATIVE_CLASS
from dit_engine.checkpoint.scheduler import read_diffusion, scheduler_beside
from dit_engine.checkpoint.vae import OPTIONS, given_fields, read_vae
from dit_engine.checkpoint.weights import check_shapes, without_storage
from dit_engine.checkpoint.wrappers import MODEL_MARKS, read_state
from dit_engine.config import NUMERICS, ModelConfig
from dit_engine.model import DiT
from dit_engine.runtime import neutral
from dit_engine.sampling.diffusion import PREDICTIONS
from dit_engine.vae import AutoencoderKL, VAEConfig

Module = TypeVar("Module", bound=nn.Module)

# Along each side of an image. A small file can ask for huge images, because each level of a VAE
# doubles the side and takes only a few kilobytes.
MOST_PIXELS = 16_384


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a source holds: state_dict has the official keys, vae_state_dict diffusers'.
    The tensors may be mapped from the file; modules that are built from this share them."""

    config: ModelConfig
    state_dict: dict[str, Tensor]
    vae_config: VAEConfig | None
    vae_state_dict: dict[str, Tensor] | None
    label_names: tuple[str, ...] | None
    source: str


@neutral()
def load_checkpoint(
    source: str | Path,
    *,
    vae: str | Path | None = None,
    numerics: str | None = None,
    num_heads: int | None = None,
    prediction: str | None = None,
    check_finite: bool = False,
    vae_scaling_factor: float | None = None,
    vae_shift_factor: float | None = None,
    vae_groups: int | None = None,
) -> Checkpoint:
    """Read a model.

    Args:
        source: an official ``.pt`` file (weights alone, or a training checkpoint, whose EMA weights
            are used), a ``.safetensors`` file, a native directory, a diffusers pipeline or
            transformer directory, a hub id (owner/name) of one of these, or "builtin".
        vae: the AutoencoderKL to use in place of the source's own: a file, a directory (also of a
            pipeline, with ``vae/`` in it), or a hub id.
        numerics: "official" or "diffusers" (see `ModelConfig`); None keeps the source's.
        num_heads: needed if neither the width nor the options of the training tell it.
        prediction: "epsilon", "v_prediction" or "sample" (see `Diffusion`), in place of what the
            files say. None takes theirs, or epsilon if they say nothing.
        check_finite: look for NaN and infinity in every weight.
        vae_scaling_factor, vae_shift_factor, vae_groups: in place of what the VAE's config.json
            calls scaling_factor, shift_factor and norm_num_groups, or if it has none.

    Raises:
        ValueError: one line that names the file and what is wrong with it.
        OSError: the file does not exist or cannot be read.
    """
    if numerics is not None:
        choice("numerics", numerics, NUMERICS)
    if prediction is not None and prediction not in PREDICTIONS:
        raise ValueError(
            f"prediction {prediction!r}: choose one of {', '.join(PREDICTIONS)}; flow models, "
            "which predict a velocity or a score over a path, are not sampled here"
        )
    if not isinstance(check_finite, bool):
        raise ValueError(f"check_finite {shown(check_finite)} is neither True nor False")
    num_heads = None if num_heads is None else positive("num_heads", num_heads)
    given = given_fields(vae_groups, vae_scaling_factor, vae_shift_factor)
    path = locate(source)
    weights, vae_path, label_names = open_directory(path) if path.is_dir() else (path, None, None)
    config, state = _read_transformer(weights, num_heads, prediction, check_finite)
    if label_names is not None and len(label_names) != config.num_classes:
        raise ValueError(f"{path}: {len(label_names)} label names, {config.num_classes} classes")
    vae_path = vae_path if vae is None else locate(vae, "vae")
    vae_config, vae_state = None, None
    if vae_path is not None:
        vae_config, vae_state = read_vae(vae_path, check_finite, given)
        if vae_config.latent_channels != config.in_channels:
            raise ValueError(
                f"{vae_path}: the VAE has {vae_config.latent_channels} latent channels, "
                f"the model {config.in_channels}"
            )
        if (side := config.input_size * vae_config.downsampling) > MOST_PIXELS:
            raise ValueError(
                f"{vae_path}: makes images of {shown(side)} pixels a side from latents of "
                f"{config.input_size}; at most {MOST_PIXELS} are allowed"
            )
    elif given:
        field, value = next(iter(given.items()))
        raise ValueError(f"{OPTIONS[field]} {value!r} is of a VAE, and {source} has none; give vae")
    config = with_numerics(config, numerics)
    return Checkpoint(config, state, vae_config, vae_state, label_names, str(source))


def load_model(
    source: str | Path,
    *,
    numerics: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    num_heads: int | None = None,
    prediction: str | None = None,
    check_finite: bool = False,
) -> DiT:
    """The reference module of any `load_checkpoint` source, in eval mode.

    dtype None keeps the file's. Raises ValueError and OSError as `load_checkpoint` does.
    """
    checkpoint = load_checkpoint(
        source,
        numerics=numerics,
        num_heads=num_heads,
        prediction=prediction,
        check_finite=check_finite,
    )
    return build_model(checkpoint, dtype, device)


@neutral()
def build_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> DiT:
    """The module, in eval mode; it shares the checkpoint's tensors unless dtype or device differ.

    If dtype is None, all weights get that of the file's first weight.
    """
    with without_storage():
        model = DiT(checkpoint.config)
    return _filled(model, checkpoint.state_dict, "x_embedder.proj.weight", dtype, device)


@neutral()
def build_vae(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> AutoencoderKL | None:
    """The same for the VAE; None if the checkpoint has none."""
    if checkpoint.vae_config is None or checkpoint.vae_state_dict is None:
        return None
    with without_storage():
        vae = AutoencoderKL(checkpoint.vae_config)
    return _filled(vae, checkpoint.vae_state_dict, "decoder.conv_in.weight", dtype, device)


def _filled(
    module: Module,
    state: dict[str, Tensor],
    first: str,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> Module:
    dtype = dtype or state[first].dtype
    moved = {key: tensor.to(device=device, dtype=dtype) for key, tensor in state.items()}
    module.load_state_dict(moved, assign=True)
    return module.eval()


def _read_transformer(
    weights: Path, num_heads: int | None, prediction: str | None, check_finite: bool
) -> tuple[ModelConfig, dict[str, Tensor]]:
    content, state, values = read_state(weights, MODEL_MARKS, check_finite)
    kind = values.pop("_class_name", None)
    try:
        if theirs := any(key.startswith(DIFFUSERS_MARK) for key in state):
            if kind not in DIFFUSERS_CLASSES:
                raise ValueError("a diffusers transformer needs its config.json beside it")
            config = config_from_diffusers(values)
        elif kind == NATIVE_CLASS:
            config = ModelConfig.from_dict(values)
        else:
            args = options_of(content, weights.name, prediction, num_heads)
            config = infer_config(state, num_heads, args)
        # Checked before anything of the config's size is built, so the file's size is the limit.
        blocks = count_blocks(state, rf"{'transformer_' if theirs else ''}blocks\.(\d+)\.")
        if blocks != config.depth:
            raise ValueError(
                f"the config's depth is {config.depth}, the file holds {blocks} blocks"
            )
        if theirs:
            state = state_from_diffusers(state, config)
        if num_heads is not None:
            config = replace(config, num_heads=num_heads)
        check_shapes(state, model_shapes(config))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{weights}: {error}") from None
    if (scheduler := scheduler_beside(weights)) is not None:
        config = replace(config, diffusion=read_diffusion(scheduler, config))
    if prediction not in (None, config.diffusion.prediction):
        try:
            diffusion = replace(config.diffusion, prediction=prediction)
        except ValueError as error:
            raise ValueError(f"{weights}: with prediction {prediction!r}, {error}") from None
        config = replace(config, diffusion=diffusion)
    return config, state
