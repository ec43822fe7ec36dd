"""Find the state dict in a file: behind dicts, prefixes of names and counters of a training."""

from __future__ import annotations

import re
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_engine.checkpoint.weights import check_tensors, read_weights
from dit_engine.io.json_files import read_json
from dit_engine.io.printable import some_of

# Names under which a training checkpoint holds weights, in the order of preference. An average of
# any name is preferred to weights that are not averaged.
WRAPPERS = ("ema", "model", "model_state_dict", "state_dict", "module", "net", "network")
_AVERAGE_WORDS = {"ema", "averaged", "average", "swa", "polyak"}
# torch puts these modules around others, at any depth of a model, when it compiles them, cuts them
# into shards, or computes them again in the backward pass.
_AROUND = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
# Each kind of state dict has one of these names; what stands before it in a file is a prefix.
MODEL_MARKS = ("x_embedder.proj.weight", "transformer_blocks.0.norm1.linear.weight")
VAE_MARKS = ("encoder.conv_in.weight", "decoder.conv_in.weight")

_DEEPEST = 4  # levels of dicts in dicts; a pickle may hold the same dict under a thousand names
_MOST_COPIES = 100  # of a model in one file, because each tensor is compared with each copy's name
_SHOWN = 80  # characters of a name
SCALE = "scale_factor"  # of the latents, in latent-diffusion's checkpoints


def is_averaged(name: object) -> bool:
    """Whether a dict or a part of a model with this name is an average of the weights."""
    return not _AVERAGE_WORDS.isdisjoint(re.split(r"[^a-z]+", str(name).lower()))


def read_state(
    path: Path, marks: tuple[str, ...], check_finite: bool
) -> tuple[dict[Any, Any], dict[str, Tensor], dict[str, Any]]:
    """(everything that a weight file holds, the state dict in it, the config.json beside it or {}).

    check_finite: a NaN or an infinity in a tensor raises ValueError.
    """
    content = read_weights(path)
    state = check_tensors(unwrapped(content, marks, path), path)
    for name, tensor in state.items() if check_finite else ():
        if not bool(torch.isfinite(tensor).all()):
            nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
            raise ValueError(
                f"{path}: tensor {name!r} holds {nan} NaN and {infinite} infinite values"
            )
    beside = path.parent / "config.json"
    return content, state, read_json(beside, lenient=True) if beside.is_file() else {}


def unwrapped(content: Mapping[Any, Any], marks: tuple[str, ...], path: Path) -> dict[Any, Any]:
    """The state dict in what a file holds, under its own names.

    It is looked for in the dicts of `levels`, behind any prefix of its names. Of several copies,
    the averaged one is used. Left out are, with a warning, single numbers beside the weights (such
    as ``n_averaged``) and averages without weights, and without one all beside an autoencoder.
    Raises ValueError if there are several copies and not exactly one is preferred.
    """
    copies: list[tuple[tuple[Any, ...], str, str, dict[Any, Any]]] = []
    for names, level in levels(content):
        if len(copies) > _MOST_COPIES:
            break
        state = {_AROUND.sub("", n) if isinstance(n, str) else n: v for n, v in level.items()}
        order = [WRAPPERS.index(n) if n in WRAPPERS else len(WRAPPERS) for n in names]
        averaged = any(map(is_averaged, names))
        for prefix in _prefixes(state, marks):
            plain = not is_averaged(prefix)
            rank = plain and not averaged, order, plain
            # For messages, and cut: all copies may be under one name of megabytes.
            place = ".".join(part[:_SHOWN] for part in (*names, prefix))
            copies.append((rank, place, prefix, state))
            if len(state) < len(level):
                raise ValueError(f"{path}: holds the same weights twice, once of a compiled model")
    if not copies:  # the names of the first tensors tell what is wrong
        tensors = (d for _, d in levels(content) if any(isinstance(v, Tensor) for v in d.values()))
        return dict(next(tensors, content))
    best = min(rank for rank, *_ in copies)
    chosen = [copy for copy in copies if copy[0] == best]
    if len(chosen) > 1 or len(copies) > _MOST_COPIES:
        places = sorted(place for _, place, *_ in copies)
        raise ValueError(f"{path}: holds several models, under {some_of(places)}; one is needed")
    (rank, place, prefix, state) = chosen[0]
    if rank[0] and (empty := [*_empty_averages(content)]):
        warnings.warn(
            f"{path}: {some_of(empty)} holds no weights; taking those of {place.rstrip('.')!r}, "
            "which are not averaged",
            stacklevel=4,
        )
    prefixes = [each for _, _, each, of in copies if of is state]
    found: dict[Any, Any] = {}
    counters: list[str] = []
    for name, value in state.items():
        owner = max((p for p in prefixes if str(name).startswith(p)), key=len, default=None)
        if owner not in (prefix, None) or (marks is VAE_MARKS and owner is None):
            continue
        ours = name.removeprefix(prefix) if owner == prefix and isinstance(name, str) else name
        if _is_single(name, value) and (owner is None or "." not in ours):
            counters.append(name)
        elif ours in found:
            raise ValueError(f"{path}: holds {ours!r} twice, once with the prefix {prefix!r}")
        else:
            found[ours] = value
    if counters and marks is not VAE_MARKS:
        warnings.warn(f"{path}: left out beside the weights: {some_of(counters)}", stacklevel=4)
    return found


def latent_scale(content: Mapping[Any, Any]) -> Any:
    """What a latent-diffusion checkpoint multiplies latents by; None if it does not say."""
    for _, level in levels(content):
        for name, value in level.items():
            if str(name).rpartition(".")[2] == SCALE and _is_single(name, value):
                return value
    return None


def levels(content: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Every dict in a file that may hold the weights or the options beside them, and the names
    under which it is found; each dict once, by the name of an average if it has one."""
    seen: set[int] = set()
    waiting: deque[tuple[tuple[str, ...], Mapping[Any, Any]]] = deque([((), content)])
    while waiting:
        names, level = waiting.popleft()
        if id(level) in seen:  # a pickle may hold itself
            continue
        seen.add(id(level))
        yield names, level
        inner = [name for name in level if name in WRAPPERS or is_averaged(name)]
        for name in sorted(inner, key=is_averaged, reverse=True):
            if isinstance(level[name], Mapping) and len(names) < _DEEPEST:
                waiting.append(((*names, str(name)), level[name]))


def _empty_averages(content: Mapping[Any, Any]) -> Iterator[str]:
    for _, level in levels(content):
        for name, value in level.items():
            if name == "ema" or (is_averaged(name) and isinstance(value, (Mapping, list, tuple))):
                yield name


def _prefixes(state: Mapping[Any, Any], marks: tuple[str, ...]) -> set[str]:
    """What stands before ``marks`` in the names."""
    return {
        name.removesuffix(mark)
        for name in state
        for mark in marks
        if isinstance(name, str) and (name == mark or name.endswith(f".{mark}"))
    }


def _is_single(name: Any, value: Any) -> bool:
    """Whether a value is a single number or a setting, and not a weight."""
    if not isinstance(name, str):
        return False
    if isinstance(value, Tensor):
        return value.ndim == 0 or (value.numel() == 1 and "." not in name)
    return value is None or isinstance(value, (bool, int, float, str))
