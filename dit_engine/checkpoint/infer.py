"""Read a network's config from the shapes of its tensors, where there is no config.json."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from dit_engine.checkpoint.options import Options
from dit_engine.checkpoint.training_args import classes, model_heads, trained_diffusion
from dit_engine.config import FAMILIES, ModelConfig
from dit_engine.io.printable import some_of


def infer_config(
    state: Mapping[str, Tensor],
    num_heads: int | None = None,
    args: Options | None = None,
) -> ModelConfig:
    """The config of an official state dict, from its shapes and the options of its training.

    The shapes do not tell the number of heads. It is ``num_heads`` if given, or what ``args`` say,
    or the published one of a published width (384, 768, 1024, 1152). Else the heads have 64
    numbers or, where 64 does not divide the width, 72, and a warning says which was taken.

    Raises ValueError where a needed key is missing or has an unknown shape, the width leaves the
    heads open, or ``args`` are those of another model.
    """
    args = args or Options()

    def shape(key: str, dimensions: int) -> torch.Size:
        if key not in state:
            raise ValueError(f"no DiT, key {key!r} is missing; it holds {some_of(state)}")
        if state[key].ndim != dimensions or not state[key].numel():
            raise ValueError(
                f"{key} is {tuple(state[key].shape)}, not of {dimensions} dimensions above 0"
            )
        return state[key].shape

    hidden_size, in_channels, p, _ = shape("x_embedder.proj.weight", 4)
    tokens = shape("pos_embed", 3)[1]
    outputs = shape("final_layer.linear.weight", 2)[0]
    if math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"pos_embed holds {tokens} tokens, which is no square")
    if outputs not in (p * p * in_channels, 2 * p * p * in_channels):
        raise ValueError(
            f"final_layer.linear gives {outputs} values a token; patch {p} and "
            f"{in_channels} channels need {p * p * in_channels} or {2 * p * p * in_channels}"
        )
    mlp_hidden_size = shape("blocks.0.mlp.fc1.weight", 2)[0]
    mlp_ratio = mlp_hidden_size / hidden_size
    if int(hidden_size * mlp_ratio) < mlp_hidden_size:  # the quotient was rounded down
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    depth = count_blocks(state, r"blocks\.(\d+)\.")
    told = {"depth": depth, "hidden_size": hidden_size, "patch_size": p}
    num_classes, null_class = classes(args, shape("y_embedder.embedding_table.weight", 2)[0])
    learn_sigma = outputs == 2 * p * p * in_channels
    return ModelConfig(
        depth=depth,
        hidden_size=hidden_size,
        num_heads=num_heads or model_heads(args, told) or infer_heads(hidden_size),
        patch_size=p,
        input_size=math.isqrt(tokens) * p,
        in_channels=in_channels,
        num_classes=num_classes,
        mlp_ratio=mlp_ratio,
        learn_sigma=learn_sigma,
        diffusion=trained_diffusion(args, learn_sigma),
        has_null_class=null_class,
    )


def infer_heads(hidden_size: int) -> int:
    """Heads for a width; raises ValueError where nothing tells."""
    published = {width: heads for _, width, heads in FAMILIES.values()}
    if hidden_size in published:
        return published[hidden_size]
    fitting = [d for d in (64, 72) if hidden_size % d == 0]
    if len(fitting) != 1:
        raise ValueError(
            f"hidden size {hidden_size} does not tell the number of heads "
            f"({'both' if fitting else 'neither'} 64 and 72 divide it); give num_heads"
        )
    heads = hidden_size // fitting[0]
    warnings.warn(
        f"hidden size {hidden_size} is none of the published ones; "
        f"taking {heads} heads of {fitting[0]} (give num_heads if it has others)",
        stacklevel=2,
    )
    return heads


def count_blocks(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many blocks the keys name, which must be 0, 1, …; the pattern captures the number."""
    found = {int(match[1]) for key in state if (match := re.match(pattern, key))}
    for expected, number in enumerate(sorted(found)):
        if number != expected:
            raise ValueError(f"block {expected} is missing, block {number} is there")
    if not found:
        raise ValueError(f"holds no block; it holds {some_of(state)}")
    return len(found)
