"""diffusers' transformer to the official names of its tensors, and back.

Official keys are those of facebookresearch/DiT ``models.py``; diffusers' are those of
``DiTTransformer2DModel`` (0.42).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dit_engine.checkpoint.weights import check_shapes, without_storage
from dit_engine.config import ModelConfig
from dit_engine.io.printable import first_line
from dit_engine.model import NORM_EPS, DiT, position_embedding

# Early diffusers saved DiT as a Transformer2DModel; the published directories still say so.
DIFFUSERS_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
DIFFUSERS_NORM_EPS = 1e-5  # DiTTransformer2DModel's default; it reaches norm3 alone
DIFFUSERS_MARK = "transformer_blocks.0."

_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_EMBEDDERS = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
_BLOCK = {
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
# A buffer that newer diffusers recomputes and older ones stored.
STORED_POSITIONS = "pos_embed.pos_embed"
# A position embedding may take this much, or as much as the weights if these take more.
LEAST_POSITIONS_BYTES = 256 * 2**20


def config_from_diffusers(values: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig (numerics "diffusers") of a ``DiTTransformer2DModel`` config.json; ValueError if
    it is of a network that is not a DiT.

    ``norm_eps`` is the epsilon of the norm before the MLP (norm3) and of no other: norm1 and the
    final norm are built with 1e-6 whatever it says.
    """
    needed = {
        "norm_type": "ada_norm_zero",
        "activation_fn": "gelu-approximate",
        "norm_elementwise_affine": False,
        "attention_bias": True,
    }
    for key, value in needed.items():
        if values.get(key, value) != value:
            raise ValueError(f"{key} is {values[key]!r}; a DiT has {value!r}")
    numbers = {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4}
    numbers = {key: values.get(key, default) for key, default in numbers.items()}
    numbers["out_channels"] = values.get("out_channels") or numbers["in_channels"]
    for key, value in numbers.items():
        if not isinstance(value, int):
            raise ValueError(f"{key} {value!r} is not a positive integer")
    heads, head_dim, in_channels, out_channels = numbers.values()
    if out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(
            f"out_channels {out_channels} is neither in_channels {in_channels} nor twice that"
        )
    return ModelConfig(
        depth=values.get("num_layers", 28),
        hidden_size=heads * head_dim,
        num_heads=heads,
        patch_size=values.get("patch_size", 2),
        input_size=values.get("sample_size", 32),
        in_channels=in_channels,
        num_classes=values.get("num_embeds_ada_norm", 1000),
        learn_sigma=out_channels == 2 * in_channels,
        numerics="diffusers",
        mlp_norm_eps=values.get("norm_eps", DIFFUSERS_NORM_EPS),
    )


def with_numerics(config: ModelConfig, numerics: str | None) -> ModelConfig:
    """``config`` with these ``numerics``, None for its own; a change also sets the norm epsilon."""
    if numerics in (None, config.numerics):
        return config
    eps = NORM_EPS if numerics == "official" else DIFFUSERS_NORM_EPS
    return replace(config, numerics=numerics, mlp_norm_eps=eps)


def model_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Official key → shape. Only one block is built, so that any depth costs little."""
    shapes: dict[str, torch.Size] = {}
    one = shapes_of(lambda whole: DiT(replace(whole, depth=1)), config)
    for key, shape in one.items():
        blocks = config.depth if key.startswith("blocks.0.") else 1
        shapes |= {key.replace(".0.", f".{i}.", 1) if i else key: shape for i in range(blocks)}
    return shapes


def shapes_of(build: Callable[[Any], nn.Module], config: object) -> dict[str, torch.Size]:
    """Key → shape of the module that ``build`` makes. Raises ValueError if it fails."""
    try:
        with without_storage():
            return {key: tensor.shape for key, tensor in build(config).state_dict().items()}
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"{str(config)[:250]} … cannot be built ({first_line(error)})") from None


def state_from_diffusers(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Diffusers' state dict → the official one. Only q, k and v are copied (into one tensor).

    diffusers keeps the time and label embedders once per block. They must be equal bit for bit,
    because a DiT has one of each. ``pos_embed`` is computed unless the file has it; its size is
    then limited, because only the config states it. Raises ValueError for keys, shapes or
    embedders that are not a DiT's.
    """
    official_shapes = model_shapes(config)
    key_map = {**dict(official_to_diffusers(config.depth)), "pos_embed": (STORED_POSITIONS,)}
    shapes: dict[str, torch.Size] = {}
    for official, names in key_map.items():
        first, *rest = official_shapes[official]
        shapes |= dict.fromkeys(names, torch.Size([first // len(names), *rest]))
    copies = [(i, *names) for i in range(1, config.depth) for names in _EMBEDDERS.items()]
    shapes |= {_embedder(i, name): official_shapes[official] for i, official, name in copies}
    positions = shapes.pop(STORED_POSITIONS) if STORED_POSITIONS not in state else None
    check_shapes(state, shapes)
    if positions is not None:
        weights = sum(tensor.nbytes for tensor in state.values())
        if 4 * positions.numel() > max(weights, LEAST_POSITIONS_BYTES):
            raise ValueError(
                f"sample_size {config.input_size} with patch_size {config.patch_size} needs a "
                f"position embedding of {positions.numel() / 2**18:.0f} MiB, but the weights have "
                f"{weights / 2**20:.0f} MiB"
            )
        table = position_embedding(config.hidden_size, config.input_size // config.patch_size)
        state = {**state, STORED_POSITIONS: table.to(state["pos_embed.proj.weight"])}
    for i, _, name in copies:
        if not _same_bits(state[_embedder(i, name)], state[_embedder(0, name)]):
            raise ValueError(f"{_embedder(i, name)} differs from block 0's; a DiT has one embedder")
    return {
        official: state[names[0]] if len(names) == 1 else torch.cat([state[n] for n in names])
        for official, names in key_map.items()
    }


def state_to_diffusers(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """What `state_from_diffusers` reads back, in tensors that share no memory with one another."""
    theirs: dict[str, Tensor] = {}
    for official, names in official_to_diffusers(depth):
        for name, part in zip(names, state[official].chunk(len(names)), strict=True):
            theirs[name] = part.clone() if len(names) > 1 else part
    for i in range(1, depth):
        for official, name in _EMBEDDERS.items():
            theirs[_embedder(i, name)] = state[official].clone()
    return theirs


def official_to_diffusers(depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Official key → the diffusers keys that make it, stacked along the first dimension."""
    for official, name in _EMBEDDERS.items():
        yield official, (_embedder(0, name),)
    for kind in ("weight", "bias"):
        for official, name in _TOP.items():
            yield f"{official}.{kind}", (f"{name}.{kind}",)
        for i in range(depth):
            for official, names in _BLOCK.items():
                theirs = tuple(f"transformer_blocks.{i}.{name}.{kind}" for name in names)
                yield f"blocks.{i}.{official}.{kind}", theirs


def _embedder(block: int, name: str) -> str:
    return f"transformer_blocks.{block}.norm1.emb.{name}"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # NaN with the same bits counts as equal; NaN is reported elsewhere.
    a_bits, b_bits = (tensor.contiguous().view(torch.uint8) for tensor in (a, b))
    return a.dtype == b.dtype and torch.equal(a_bits, b_bits)
