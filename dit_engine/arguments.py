"""Values that callers give, read whatever their type, or refused by name."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

_LIMIT = 80  # characters of a value in a message


def shown(value: Any) -> str:
    """``value`` for a message: its repr in one line of bounded length, of arrays their shape."""
    if hasattr(value, "dtype") and (shape := getattr(value, "shape", ())):
        return f"<{str(value.dtype).removeprefix('torch.')} {tuple(shape)}>"
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no integers of more than some thousand digits
        return f"<{type(value).__name__} of too many digits>"
    return text if len(text) <= _LIMIT else f"{text[: _LIMIT - 1]}…"


def choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """``value`` if it is one of the strings ``allowed``.

    Raises ValueError, which tells the argument's name, its value and what is allowed.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} {shown(value)}: choose one of {', '.join(allowed)}")
    return value


def scalar(value: Any) -> Any:
    """An array or a tensor without dimensions as the Python value that it holds; all else as is."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        try:
            return value.item()
        except (RuntimeError, TypeError, ValueError):  # of a tensor without storage
            return value
    return value


def whole_number(value: Any) -> int | None:
    """A whole number of whatever type, NumPy's and torch's too; None for all else: booleans,
    floats, arrays with dimensions."""
    value = scalar(value)
    if isinstance(value, bool) or getattr(value, "ndim", 0) or not hasattr(value, "__index__"):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def real_number(value: Any) -> float | None:
    """A real number of whatever type, NumPy's and torch's too; None for all else: booleans, text,
    arrays with dimensions."""
    value = scalar(value)
    if isinstance(value, bool | str | bytes | bytearray) or getattr(value, "ndim", 0):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def positive(name: str, value: Any) -> int:
    """``value`` as an int of 1 or more; else ValueError, which tells the argument's name."""
    number = whole_number(value)
    if number is None or number < 1:
        raise ValueError(f"{name} {shown(value)} is not a positive integer")
    return number
