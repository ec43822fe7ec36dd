"""Keywords that other projects use, and mistyped ones: the message says what ours is called."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, TypeVar

# diffusers' names and those of the official DiT → ours.
_ELSEWHERE = {
    "num_inference_steps": "steps",
    "num_sampling_steps": "steps",
    "num_steps": "steps",
    "class_labels": "labels",
    "classes": "labels",
    "cfg_scale": "guidance_scale",
    "cfg": "guidance_scale",
    "scheduler": "sampler",
    "generator": "seed",
    "output_type": "output",
    "callback_on_step_end": "callback",
    "dtype": "precision",
    "torch_dtype": "precision",
}
F = TypeVar("F", bound=Callable[..., Any])


def our_name(name: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that ``name`` is likely to mean; None where nothing is like it."""
    known = list(known)
    elsewhere = _ELSEWHERE.get(name)
    return elsewhere if elsewhere in known else next(iter(get_close_matches(name, known, 1)), None)


def names_ours(function: F) -> F:
    """Decorate ``function``: its TypeError for an unknown keyword suggests the right one."""
    known = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def named(*values: Any, **options: Any) -> Any:
        for name in options:
            if name not in known:
                ours = our_name(name, known)
                hint = f"it is called {ours!r} here" if ours else f"choose from {', '.join(known)}"
                raise TypeError(f"{function.__name__}() has no keyword {name!r}; {hint}")
        return function(*values, **options)

    return named  # pyright: ignore[reportReturnType]
