"""Class labels as people write them, names or numbers."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from dit_engine.arguments import dimensions, scalar, sequence, shown, whole_number
from dit_engine.io.printable import one_line, printable

# Characters of a name. Unicode normalisation of combining accents takes a time that grows with the
# square of their number.
MOST_CHARACTERS = 500
_NUMERAL = re.compile(r"(?:number:)?(-?\d+)")


def resolve_labels(
    labels: int | str | Iterable[int | str], num_classes: int, names: Sequence[str] | None
) -> list[int]:
    """Class numbers for ``labels``: one or many numbers, numerals or names, also in arrays.

    A name is that of a class or one of its aliases ("tench, Tinca tinca" has two). The same case is
    preferred to another; composed and decomposed letters are the same. "number:3" is class 3,
    whatever the names are.

    Raises ValueError, which names the label and what is allowed, if it is out of range, unknown,
    a name that several classes have, or a numeral that is also the name of another class.
    """
    if (dimensions(labels) or 0) > 1:
        raise ValueError(f"labels has shape {tuple(labels.shape)}; one dimension is needed")  # pyright: ignore[reportAttributeAccessIssue]
    items = list(labels) if isinstance(labels, Iterator) else sequence(labels)
    if items == []:
        raise ValueError("labels is empty; give at least one class name or number")
    lookup = _lookup(tuple(names or ()))
    return [_resolve(each, num_classes, lookup) for each in ([labels] if items is None else items)]


def class_order(names: Iterable[str]) -> list[str]:
    """Names of classes in the order of their numbers: numerals by value, then the others."""

    def place(name: str) -> tuple[bool, int, str]:
        numeral = name.isascii() and name.isdecimal() and len(name) < 20
        return not numeral, int(name) if numeral else 0, name

    return sorted(names, key=place)


def check_names(name: str, names: Any, num_classes: int) -> tuple[str, ...]:
    """``names``, the argument ``name``, if they are one string per class; else ValueError."""
    found = sequence(names)
    if found is None:
        raise ValueError(f"{name} {shown(names)} is not a list of names, one per class")
    if len(found) != num_classes:
        raise ValueError(f"{name} holds {len(found)} for {num_classes} classes")
    for each in found:
        if not isinstance(each, str):
            raise ValueError(f"{name} holds {shown(each)}, which is not a string")
        if len(each) > MOST_CHARACTERS:
            raise ValueError(
                f"{name} holds {shown(each)}, of {len(each)} characters; at most "
                f"{MOST_CHARACTERS} are allowed"
            )
    return tuple(found)


def shared_names(names: Sequence[str]) -> dict[str, list[int]]:
    """The names and aliases that several classes have in the same case → those classes' numbers."""
    exact = _lookup(tuple(names)).exact
    return {name: sorted(owners) for name, owners in exact.items() if len(owners) > 1}


def same_name(names: Iterable[str]) -> tuple[str, str] | None:
    """The first two of ``names`` that `resolve_labels` takes for one name, although no letter has
    another case: one has composed and the other decomposed letters, or their spaces differ."""
    found: dict[str, str] = {}
    for name in names:
        if (other := found.setdefault(_composed(name), name)) != name:
            return other, name
    return None


class _Lookup:
    """Which classes have a name: in its own case, and in any."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.exact: dict[str, set[int]] = {}
        self.folded: dict[str, set[int]] = {}
        for number, name in enumerate(names):
            for alias in {name, *name.split(",")}:
                if key := _composed(alias):
                    self.exact.setdefault(key, set()).add(number)
                    self.folded.setdefault(_folded(alias), set()).add(number)

    def classes(self, name: str) -> set[int]:
        if len(name) > MOST_CHARACTERS:
            return set()
        return self.exact.get(_composed(name)) or self.folded.get(_folded(name)) or set()


_lookup = lru_cache(maxsize=8)(_Lookup)


def _composed(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).split())


def _folded(name: str) -> str:
    return _composed(unicodedata.normalize("NFD", name).casefold())


def _resolve(label: Any, num_classes: int, lookup: _Lookup) -> int:
    label = scalar(label)
    if isinstance(label, str):
        classes, numeral = lookup.classes(label), _NUMERAL.fullmatch(label.strip())
        # No class has a longer number.
        number = int(numeral[1]) if numeral and len(numeral[1]) < 20 else -1
        if classes:
            return _named(label, classes, number if 0 <= number < num_classes else None, lookup)
        if numeral is None:
            raise ValueError(
                f"label {shown(label)} is unknown; {_allowed(label, num_classes, lookup)}"
            )
    else:
        number = whole_number(label)
        if number is None:
            raise ValueError(f"label {shown(label)} is neither a name nor a whole number")
    if not 0 <= number < num_classes:
        told = shown(label).strip("'")
        raise ValueError(f"label {told} is out of range; allowed are 0 to {num_classes - 1}")
    return number


def _named(label: str, classes: set[int], number: int | None, lookup: _Lookup) -> int:
    """The class of a name that ``classes`` have, and which may also be read as a number."""
    if len(classes) > 1:
        names = " and ".join(f"{i} ({one_line(lookup.names[i])})" for i in sorted(classes))
        raise ValueError(f"label {shown(label)} is a name of classes {names}: give the number")
    (named,) = classes
    if number not in (None, named):
        raise ValueError(
            f"label {shown(label)} is the name of class {named} and the number of class {number} "
            f"({one_line(lookup.names[number])}): give number:{named} or number:{number}, or an int"
        )
    return named


def _allowed(label: str, num_classes: int, lookup: _Lookup) -> str:
    numbers = f"numbers 0 to {num_classes - 1}"
    if not lookup.names:
        return f"this model has no label names, use {numbers}"
    names = lookup.folded
    near = difflib.get_close_matches(_folded(label[:80])[:80], names)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    few = ", ".join(map(printable, names))
    if len(names) > 30:
        few = f"{len(names)} names (see --list-labels)"
    return f"{hint}allowed are {few} and {numbers}"
