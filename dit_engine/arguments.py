"""Read the values that callers give, of whatever numeric type, and name them in messages."""

from __future__ import annotations

import functools
import inspect
import operator
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from difflib import get_close_matches
from typing import Any, TypeVar

from dit_engine.io.printable import printable

_LIMIT = 80  # characters of a value in a message
# Names in diffusers and in the official DiT → our names.
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


def dimensions(value: Any) -> int | None:
    """The number of dimensions of an array or a tensor; None for anything else."""
    array = hasattr(value, "dtype") and not isinstance(value, type)
    return getattr(value, "ndim", None) if array else None


class _Bounded(reprlib.Repr):
    """Lists that each hold the next one twice take little memory, but have a repr of gigabytes."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxlong, self.maxother = 3, 400, 400, 400
        self.maxlist = self.maxtuple = self.maxset = self.maxdict = 30

    def repr1(self, x: Any, level: int) -> str:
        if dimensions(x):
            return f"<{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}>"
        kind = type(x)
        if kind.__name__ == "Namespace":
            return f"Namespace({self.repr_dict(vars(x), level)})"
        if isinstance(x, dict) and kind is not dict:
            return f"{kind.__name__}({self.repr_dict(x, level)})"
        if isinstance(x, (bytes, bytearray)):
            x = x[: self.maxother]
        return super().repr1(x, level)


def shown(value: Any) -> str:
    """``value`` for a message: one line of bounded length, its repr or the shape of an array."""
    try:
        text = printable(" ".join(_BOUNDED.repr(value).split()))
    except ValueError:  # Python refuses to print integers of several thousand digits
        return f"<{type(value).__name__} of too many digits>"
    return text if len(text) <= _LIMIT else f"{text[: _LIMIT - 1]}…"


_BOUNDED = _Bounded()


def choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """``value`` if it is one of the strings ``allowed``; else ValueError, which names them."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} {shown(value)}: choose one of {', '.join(allowed)}")
    return str(value)


def sequence(value: Any) -> list[Any] | None:
    """The entries of a list, an array or anything else with an order and a length. None for all
    others, such as text, sets and iterators (which may never end)."""
    if isinstance(value, str | bytes | bytearray | Mapping | Set | Iterator | type):
        return None
    if dimensions(value) == 0:
        return None
    try:
        return list(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def scalar(value: Any) -> Any:
    """The Python value in an array or a tensor without dimensions, None if it is masked; any other
    value unchanged."""
    if dimensions(value) == 0 and hasattr(value, "item"):
        try:
            return None if getattr(value, "mask", False) else value.item()
        except (RuntimeError, TypeError, ValueError):  # of a tensor without storage
            return value
    return value


def whole_number(value: Any) -> int | None:
    """A whole number of any type, also NumPy's and torch's; None for anything else, such as
    booleans, floats and arrays with dimensions."""
    return _converted(value, operator.index)


def real_number(value: Any) -> float | None:
    """A real number of any type, also NumPy's and torch's; None for other values, such as booleans,
    text, arrays with dimensions and masked values."""
    return _converted(value, float)


def _converted(value: Any, convert: Callable[[Any], Any]) -> Any:
    value = scalar(value)
    if isinstance(value, bool | str | bytes | bytearray | type) or dimensions(value):
        return None
    try:
        return convert(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def positive(name: str, value: Any) -> int:
    """``value`` as an int of 1 or more; else ValueError, which names the argument and the value."""
    number = whole_number(value)
    if number is None or number < 1:
        raise ValueError(f"{name} {shown(value)} is not a positive integer")
    return number


def our_name(name: str, known: Iterable[str]) -> str | None:
    """The name among ``known`` that ``name`` probably means; None if none is like it."""
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
