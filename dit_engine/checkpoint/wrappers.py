"""What training code puts around the weights: dicts, prefixes of names, counters beside them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_engine.checkpoint.weights import some_of

# Under which names a training checkpoint holds weights, the ones to sample with first.
AVERAGED = (
    "ema",
    "model_ema",
    "ema_model",
    "ema_state_dict",
    "state_dict_ema",
    "model_ema_state_dict",
    "ema_model_state_dict",
)
WRAPPERS = (*AVERAGED, "model", "model_state_dict", "state_dict", "module", "net", "network")
# Modules that torch puts around another one, at any depth of a model, when it is compiled, cut
# into shards, or computed again in the backward pass.
_AROUND = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
# One name of each kind of state dict that is read; what stands before it is a prefix.
MODEL_MARKS = ("x_embedder.proj.weight", "transformer_blocks.0.norm1.linear.weight")
VAE_MARKS = ("encoder.conv_in.weight", "decoder.conv_in.weight")


def unwrapped(content: Mapping[Any, Any], marks: tuple[str, ...], path: Path) -> dict[Any, Any]:
    """The state dict in what a file holds, under its own names.

    Dicts of `WRAPPERS` are opened, in each other too. Then the prefix before ``marks`` is dropped
    if all names have it, or, for an autoencoder, taken out of a larger model. Of an averaged and a
    plain copy side by side the averaged one is taken. Single numbers beside the weights, such as
    ``n_averaged``, are left out with a warning, and so is an average that holds no weights.

    Raises:
        ValueError: several copies of a model, of which none is said to be the averaged one.
    """
    found = _opened(content, path)
    state = {
        _AROUND.sub("", name) if isinstance(name, str) else name: value
        for name, value in found.items()
    }
    if len(state) < len(found):
        raise ValueError(f"{path}: holds the same weights twice, once of a compiled model")
    prefixes = {
        name.removesuffix(mark)
        for name in state
        for mark in marks
        if isinstance(name, str) and (name == mark or name.endswith(f".{mark}"))
    }
    if not prefixes:
        return state  # the names tell what is wrong
    if counters := [name for name, value in state.items() if _is_counter(name, value)]:
        state = {name: value for name, value in state.items() if name not in counters}
        warnings.warn(f"{path}: left out beside the weights: {some_of(counters)}", stacklevel=4)
    if len(prefixes) > 1 and "" not in prefixes:
        state, prefixes = _averaged(state, prefixes, path)
    prefix = min(prefixes)
    ours = {name: value for name, value in state.items() if str(name).startswith(prefix)}
    if len(ours) < len(state) and marks is not VAE_MARKS:
        return state
    return {name.removeprefix(prefix): value for name, value in ours.items()} if prefix else ours


def _opened(content: Mapping[Any, Any], path: Path, depth: int = 0) -> Mapping[Any, Any]:
    """The first dict with tensors in it, behind the names of `WRAPPERS`; else ``content``."""
    empty = []
    for name in WRAPPERS:
        inner = content.get(name)
        if isinstance(inner, Mapping) and depth < 4:  # a pickle may hold itself
            found = _opened(inner, path, depth + 1)
            if any(isinstance(value, Tensor) for value in found.values()):
                if empty:
                    warnings.warn(
                        f"{path}: {some_of(empty)} holds no weights; taking those of {name!r}, "
                        "which are not averaged",
                        stacklevel=5,
                    )
                return found
        if name in content and name in AVERAGED:
            empty.append(name)
    return content


def _is_counter(name: Any, value: Any) -> bool:
    """Whether this is a single number, or a setting, beside the weights."""
    if not isinstance(name, str):
        return False
    if isinstance(value, Tensor):
        return value.ndim == 0 or (value.numel() == 1 and "." not in name)
    return value is None or isinstance(value, (bool, int, float, str))


def _averaged(
    state: dict[Any, Any], prefixes: set[str], path: Path
) -> tuple[dict[Any, Any], set[str]]:
    """``state`` without the copies of the model that are not the averaged one."""
    averaged = {prefix for prefix in prefixes if not {*prefix.split(".")}.isdisjoint(AVERAGED)}
    if len(averaged) != 1:
        raise ValueError(
            f"{path}: holds several models, under {some_of(sorted(prefixes))}; one is needed"
        )
    others = tuple(prefixes - averaged)
    return {n: v for n, v in state.items() if not str(n).startswith(others)}, averaged
