"""The autoencoder: the file of an AutoencoderKL → its config and its state dict."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_engine.arguments import positive, real_number, shown
from dit_engine.checkpoint.convert import shapes_of
from dit_engine.checkpoint.hub import find_weights, listing
from dit_engine.checkpoint.infer import count_blocks
from dit_engine.checkpoint.weights import check_shapes
from dit_engine.checkpoint.wrappers import VAE_MARKS, latent_scale, read_state
from dit_engine.io.json_files import read_json
from dit_engine.io.printable import some_of
from dit_engine.vae import AutoencoderKL, VAEConfig

VAE_CLASS = "AutoencoderKL"
# Fields of the config that the tensors do not tell, and their names in `load_checkpoint` if any.
FIELDS = ("norm_num_groups", "scaling_factor", "shift_factor", "latents_mean", "latents_std")
OPTIONS = {"norm_num_groups": "vae_groups", "scaling_factor": "vae_scaling_factor",
           "shift_factor": "vae_shift_factor"}  # fmt: skip

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# latent-diffusion's names of an autoencoder's modules, applied one after the other.
_ORIGINAL_NAMES = (
    (r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1."),
    (r"_blocks\.(\d+)\.block\.(\d+)\.", r"_blocks.\1.resnets.\2."),
    (r"_blocks\.(\d+)\.(down|up)sample\.conv\.", r"_blocks.\1.\2samplers.0.conv."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
)


def given_fields(groups: Any, scaling_factor: Any, shift_factor: Any) -> dict[str, Any]:
    """The fields of the config that a caller gives, without those that are None, checked."""
    given: dict[str, Any] = {}
    if groups is not None:
        given["norm_num_groups"] = positive("vae_groups", groups)
    for field, value in (("scaling_factor", scaling_factor), ("shift_factor", shift_factor)):
        if value is None:
            continue
        given[field] = number = real_number(value)
        above = field == "scaling_factor"
        if number is None or not math.isfinite(number) or (above and number <= 0):
            allowed = "a finite number above 0" if above else "a finite number"
            raise ValueError(f"{OPTIONS[field]} {shown(value)} is not {allowed}")
    return given


def read_vae(
    path: Path, check_finite: bool, given: dict[str, Any]
) -> tuple[VAEConfig, dict[str, Tensor]]:
    """Config and state dict of an AutoencoderKL's file, directory, or pipeline directory.

    given: fields of the config that replace those of the file.
    """
    if path.is_dir():
        path = path / "vae" if (path / "vae").is_dir() else path
        if not (path / "config.json").is_file():
            raise ValueError(f"{path}: no VAE; it needs config.json, it holds {listing(path)}")
        kind = read_json(path / "config.json", lenient=True).get("_class_name")
        if kind != VAE_CLASS:
            raise ValueError(f"{path}: config.json is of class {kind!r}; {VAE_CLASS} is needed")
        path = find_weights(path)
    content, state, values = read_state(path, VAE_MARKS, check_finite)
    state = normalised(state)
    try:
        if values.get("_class_name") == VAE_CLASS:
            config = VAEConfig.from_dict(values | given)
        else:
            told: dict[str, Any] = {}
            if (scale := latent_scale(content)) is not None:
                told["scaling_factor"] = scale.item() if isinstance(scale, Tensor) else scale
            if "_class_name" not in values:
                told |= {name: values[name] for name in FIELDS if name in values}
            config = infer_vae_config(state, **(told | given))
        # Refuse a config of many more tensors than the file holds, before a module of its size is
        # built. If only a few are missing, `check_shapes` names them.
        levels, layers = len(config.block_out_channels), config.layers_per_block
        needed = 8 * levels * (2 * layers + 1)  # in the residual blocks, as a lower bound
        if needed > 1000 + 10 * len(state):
            raise ValueError(
                f"{levels} block_out_channels with layers_per_block {shown(layers)} need "
                f"{shown(needed)} tensors; the file holds {len(state)}"
            )
        check_shapes(state, shapes_of(AutoencoderKL, config))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    return config, state


def infer_vae_config(state: Mapping[str, Tensor], **given: Any) -> VAEConfig:
    """The config of an AutoencoderKL's tensors (keys as after `normalised`).

    The number of norm groups and the scaling factor cannot be read from them. Unless they are
    ``given``, they are Stable Diffusion's 32 and 0.18215, and a warning says so.
    """

    def width(key: str, dimension: int) -> int:
        if key not in state or state[key].ndim <= dimension:
            raise ValueError(
                f"no AutoencoderKL, key {key!r} is missing or has no dimension "
                f"{dimension}; it holds {some_of(state)}"
            )
        return state[key].shape[dimension]

    guesses = {"norm_num_groups": "norm groups", "scaling_factor": "as the scaling factor"}
    if usual := [name for name in guesses if name not in given]:
        guessed = " and ".join(f"{getattr(VAEConfig, name)} {guesses[name]}" for name in usual)
        warnings.warn(
            f"nothing tells all of the VAE's config: taking Stable Diffusion's {guessed} "
            f"(give {' and '.join(OPTIONS[name] for name in usual)} if it has others)",
            stacklevel=4,
        )
    levels = count_blocks(state, r"encoder\.down_blocks\.(\d+)\.")
    return VAEConfig(
        in_channels=width("encoder.conv_in.weight", 1),
        out_channels=width("decoder.conv_out.weight", 0),
        latent_channels=width("post_quant_conv.weight", 0),
        block_out_channels=tuple(
            width(f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 0) for i in range(levels)
        ),
        layers_per_block=count_blocks(state, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        mid_block_add_attention="encoder.mid_block.attentions.0.to_q.weight" in state,
        **given,
    )


def normalised(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under AutoencoderKL's keys, with attention as to_q, to_k, to_v and to_out.0.

    Files from before diffusers 0.12 say query, key, value and proj_attn. Files from the original
    Stable Diffusion may hold these weights as 1×1 convolutions, (C, C, 1, 1), and may have the
    names of CompVis/latent-diffusion (``diffusionmodules/model.py``). There the decoder's levels
    are numbered from the finest one, and the file of a training may hold the discriminator of its
    loss.
    """
    original = any(key.startswith(("encoder.down.", "decoder.up.")) for key in state)
    up = re.compile(r"decoder\.up\.(\d{1,4})\.")
    last = max((int(match[1]) for key in state if (match := up.match(key))), default=0)
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if original:
            if key.startswith(("loss.", "model_ema.")):
                continue
            if match := up.match(key):
                key = f"decoder.up_blocks.{last - int(match[1])}.{key[match.end() :]}"
            for pattern, name in _ORIGINAL_NAMES:
                key = re.sub(pattern, name, key)
        match = re.fullmatch(r"(.+\.attentions\.\d+)\.(\w+)(?:\.0)?\.(weight|bias)", key)
        if match and match[2] != "group_norm":
            module = _OLD_ATTENTION.get(match[2])
            key = f"{match[1]}.{module}.{match[3]}" if module else key
            tensor = tensor[:, :, 0, 0] if tensor.shape[2:] == (1, 1) else tensor
        renamed[key] = tensor
    return renamed
