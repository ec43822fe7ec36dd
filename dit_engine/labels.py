"""Class labels as people write them, names or numbers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


def resolve_labels(
    labels: int | str | Iterable[int | str], num_classes: int, names: Sequence[str] | None
) -> list[int]:
    """Class numbers for ``labels``: numbers, numerals, or names (any case).

    Raises ValueError naming the label that is out of range or unknown, and what is allowed.
    """
    items: list[Any] = [labels] if isinstance(labels, int | str) else list(labels)
    if not items:
        raise ValueError("labels is empty; give at least one class name or number")
    lookup = _lookup(names or ())
    return [_resolve(item, num_classes, lookup) for item in items]


def _lookup(names: Sequence[str]) -> dict[str, int]:
    """Class numbers by lower-case name, and by each alias of "tench, Tinca tinca" that is unique.

    ImageNet has two "crane" and two "maillot": those must be given whole or by number.
    """
    whole = {name.lower(): i for i, name in enumerate(names)}
    owners: dict[str, set[int]] = {}
    for name, i in whole.items():
        for alias in name.split(","):
            owners.setdefault(alias.strip(), set()).add(i)
    unique = {alias: next(iter(i)) for alias, i in owners.items() if len(i) == 1}
    return unique | whole


def _resolve(label: Any, num_classes: int, lookup: dict[str, int]) -> int:
    if isinstance(label, str):
        if label.lower() in lookup:
            return lookup[label.lower()]
        if not label.lstrip("-").isdecimal():
            raise ValueError(f"label {label!r} is unknown; {_allowed(label, num_classes, lookup)}")
    elif isinstance(label, bool) or not hasattr(label, "__index__"):
        raise ValueError(f"label {label!r} is neither a name nor a whole number")
    number = int(label)
    if not 0 <= number < num_classes:
        raise ValueError(f"label {number} is out of range; allowed are 0 to {num_classes - 1}")
    return number


def _allowed(label: str, num_classes: int, lookup: dict[str, int]) -> str:
    numbers = f"numbers 0 to {num_classes - 1}"
    if not lookup:
        return f"this model has no label names, use {numbers}"
    near = difflib.get_close_matches(label.lower(), lookup)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    few = ", ".join(lookup) if len(lookup) <= 30 else f"{len(lookup)} names (see --list-labels)"
    return f"{hint}allowed are {few} and {numbers}"
