"""Find the state dict in a file: behind dicts, prefixes of names and counters of a training."""

from __future__ import annotations

import re
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_engine.checkpoint.weights import check_all_finite, check_tensors, read_weights
from dit_engine.io.json_files import read_json
from dit_engine.io.printable import some_of

# Names under which a training checkpoint holds weights; those to sample with come first.
AVERAGED = (
    "ema",
    "model_ema",
    "ema_model",
    "ema_state_dict",
    "state_dict_ema",
    "model_ema_state_dict",
    "ema_model_state_dict",
)
_AVERAGE_WORDS = {"ema", "averaged", "average", "swa", "polyak"}
WRAPPERS = (*AVERAGED, "model", "model_state_dict", "state_dict", "module", "net", "network")
# torch puts these modules around others, at any depth of a model, when it compiles them, cuts them
# into shards, or computes them again in the backward pass.
_AROUND = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
# Each kind of state dict has one of these names; what stands before it in a file is a prefix.
MODEL_MARKS = ("x_embedder.proj.weight", "transformer_blocks.0.norm1.linear.weight")
VAE_MARKS = ("encoder.conv_in.weight", "decoder.conv_in.weight")

_MOST_COPIES = 100  # of a model in one file, because each tensor is compared with each copy's name
SCALE = "scale_factor"  # of the latents, in latent-diffusion's checkpoints


def is_averaged(name: str) -> bool:
    """Whether a dict, or a part of a model, of this name is an average of the weights."""
    return not _AVERAGE_WORDS.isdisjoint(re.split(r"[^a-z]+", name.lower()))


def read_state(
    path: Path, marks: tuple[str, ...], check_finite: bool
) -> tuple[dict[Any, Any], dict[str, Tensor], dict[str, Any]]:
    """(everything that a weight file holds, the state dict in it, the config.json beside it or {}).

    Raises ValueError as `read_weights`, `unwrapped` and `check_tensors` do.
    """
    content = read_weights(path)
    state = check_tensors(unwrapped(content, marks, path), path)
    if check_finite:
        check_all_finite(state, path)
    beside = path.parent / "config.json"
    return content, state, read_json(beside, lenient=True) if beside.is_file() else {}


def unwrapped(content: Mapping[Any, Any], marks: tuple[str, ...], path: Path) -> dict[Any, Any]:
    """The state dict in what a file holds, under its own names.

    Dicts with names in `WRAPPERS`, and averages by any name, are opened, also inside one another.
    Then the prefix before ``marks`` is dropped if all names have it; an autoencoder is also taken
    out of a larger model. If there are an averaged and a plain copy, the averaged one is used.
    Single numbers beside the weights, such as ``n_averaged``, and averages without weights are left
    out with a warning.

    Raises:
        ValueError: there are several copies of a model, and not exactly one is an average.
    """
    found = _opened(content, marks, path)
    state = {
        _AROUND.sub("", name) if isinstance(name, str) else name: value
        for name, value in found.items()
    }
    if len(state) < len(found):
        raise ValueError(f"{path}: holds the same weights twice, once of a compiled model")
    prefixes = _prefixes(state, marks)
    if not prefixes:
        return state  # the names tell what is wrong
    prefix = _chosen(prefixes, path)

    def owner(name: Any) -> str | None:
        return max((p for p in prefixes if str(name).startswith(p)), key=len, default=None)

    state = {name: value for name, value in state.items() if owner(name) in (prefix, None)}
    ours = {name for name in state if owner(name) == prefix}
    modules = {_module(name, prefix) for name in ours if not _is_single(name, state[name])} - {""}
    counters = [
        name
        for name, value in state.items()
        if _is_single(name, value) and not (name in ours and _module(name, prefix) in modules)
    ]
    state = {name: value for name, value in state.items() if name not in counters}
    if marks is VAE_MARKS:
        counters = [name for name in counters if not _is_scale(name)]
    if counters:
        warnings.warn(f"{path}: left out beside the weights: {some_of(counters)}", stacklevel=4)
    if marks is not VAE_MARKS and not ours.issuperset(state):
        return state
    return {name.removeprefix(prefix): value for name, value in state.items() if name in ours}


def latent_scale(content: Mapping[Any, Any]) -> Any:
    """What a latent-diffusion checkpoint multiplies latents by; None if it does not say."""
    for level in levels(content):
        for name, value in level.items():
            if isinstance(name, str) and _is_scale(name) and _is_single(name, value):
                return value
    return None


def levels(content: Mapping[Any, Any]) -> Iterator[Mapping[Any, Any]]:
    """Every dict in a file that may hold the weights or the options beside them."""
    seen: set[int] = set()
    waiting = deque([content])
    while waiting:
        level = waiting.popleft()
        if id(level) in seen:  # a pickle may hold itself
            continue
        seen.add(id(level))
        yield level
        waiting += [
            value
            for name, value in level.items()
            if isinstance(value, Mapping) and (name in WRAPPERS or is_averaged(str(name)))
        ]


def _opened(
    content: Mapping[Any, Any],
    marks: tuple[str, ...],
    path: Path,
    depth: int = 0,
    seen: set[tuple[int, int]] | None = None,
) -> Mapping[Any, Any]:
    """The first dict with tensors that is found under the names of `WRAPPERS`; else ``content``.

    An average with a name of its own is preferred to what is no average, if it is of this model.
    seen: dicts that were searched before, with their depth. A pickle may hold the same dict under
    a thousand names.
    """
    seen = set() if seen is None else seen
    averages = [name for name in content if is_averaged(str(name)) and name not in WRAPPERS]
    empty = []
    for name in (*AVERAGED, *averages, *WRAPPERS[len(AVERAGED) :]):
        inner = content.get(name)
        place = id(inner), depth
        if isinstance(inner, Mapping) and depth < 4 and place not in seen:  # a dict may hold itself
            seen.add(place)
            found = _opened(inner, marks, path, depth + 1, seen)
            if any(isinstance(value, Tensor) for value in found.values()) and (
                name in WRAPPERS or _prefixes(found, marks)
            ):
                if empty:
                    warnings.warn(
                        f"{path}: {some_of(empty)} holds no weights; taking those of {name!r}, "
                        "which are not averaged",
                        stacklevel=5,
                    )
                return found
        listed = isinstance(inner, (Mapping, list, tuple)) and name in averages
        if (name in content and name in AVERAGED) or listed:
            empty.append(name)
    return content


def _prefixes(state: Mapping[Any, Any], marks: tuple[str, ...]) -> set[str]:
    """What stands before ``marks`` in the names."""
    return {
        name.removesuffix(mark)
        for name in state
        for mark in marks
        if isinstance(name, str) and (name == mark or name.endswith(f".{mark}"))
    }


def _chosen(prefixes: set[str], path: Path) -> str:
    """The prefix of the averaged copy, or the only prefix."""
    averaged = {prefix for prefix in prefixes if any(map(is_averaged, prefix.split(".")))}
    if len(prefixes) > _MOST_COPIES or (len(prefixes) > 1 and len(averaged) != 1):
        raise ValueError(
            f"{path}: holds several models, under {some_of(sorted(prefixes))}; one is needed"
        )
    return next(iter(averaged or prefixes))


def _module(name: str, prefix: str) -> str:
    """The first part of a name in the model; "" if it is not in one of its modules."""
    return name.removeprefix(prefix).rpartition(".")[0].partition(".")[0]


def _is_scale(name: str) -> bool:
    return name.rpartition(".")[2] == SCALE


def _is_single(name: Any, value: Any) -> bool:
    """Whether a value is a single number or a setting, and not a weight."""
    if not isinstance(name, str):
        return False
    if isinstance(value, Tensor):
        return value.ndim == 0 or (value.numel() == 1 and "." not in name)
    return value is None or isinstance(value, (bool, int, float, str))
