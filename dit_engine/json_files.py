"""JSON of others: read within limits, and checked against a schema.

A schema maps a place to the keys that an object there has, and each key to the kind of its value:

>>> {"": {"format": "integer", "files": "object"},
...  "files": {"<file name>": "object"},
...  "files{}": {"bytes": "count", "sha256": "text", "note?": "text?"},
...  "graphs[]": {"shape": "count|text[]", "dtype": ("fp32", "fp16")}}

A place that ends in "[]" is every entry of a list, one that ends in "{}" every value of an object.
A key that ends in "?" may be missing; "<kind>" stands for all keys of an object, which are then of
that kind. "|" in a kind is "or", "[]" after it a list of such values, "?" at its end allows null; a
tuple holds the allowed values themselves. A "line" is a text that a message can hold. Keys that a
schema does not name may be there too.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dit_engine.arguments import shown
from dit_engine.formats import JSON, check_format

DEPTH = 64
"""Lists and objects within each other; our own files and those of model hubs have less than ten."""

LIMIT_BYTES = 16 * 2**20
"""Parsed, a text such as ``[{},{},…`` takes twenty times its size in memory."""

DIGITS = 1000  # of one number
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

Schema = Mapping[str, Mapping[str, "str | tuple[Any, ...]"]]


def parse_json(text: str | bytes, source: object, lenient: bool = False) -> Any:
    """The value of a JSON text. Its whole numbers have 64 bits, its numbers are finite, and its
    texts can be written in UTF-8. Of keys that are there twice, the last one counts.

    Args:
        source: what the text is, for messages, such as the path of its file.
        lenient: also NaN, Infinity, longer numbers, and halves of surrogate pairs (bytes of paths
            that are no text), as Python itself writes them: for values that are each looked at
            afterwards.

    Raises ValueError, one line that names ``source``, for all else.
    """
    try:
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        if len(data) > LIMIT_BYTES:
            raise ValueError(f"has more than the {LIMIT_BYTES >> 20} MiB that are read of JSON")
        _check_depth(data)
        values = json.loads(
            data.decode("utf-8", "surrogatepass" if lenient else "strict"),
            parse_int=_any_whole if lenient else _whole,
            parse_float=None if lenient else _finite,
            parse_constant=None if lenient else _refuse_constant,
        )
        if not lenient and _SURROGATE.search(data):
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{source}: holds half of a surrogate pair, which is no text") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: not valid JSON ({error})") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return values


def read_json_value(path: Path, lenient: bool = False, pipe: bool = False) -> Any:
    """`parse_json` of a file; pipe: it may also be one, or a device, such as /dev/stdin.

    Raises ValueError as `parse_json` does, and OSError where the file cannot be read.
    """
    try:
        kind = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} does not exist; a JSON file is needed") from None
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(f"{path} is a directory; a JSON file is needed")
    if not (pipe or stat.S_ISREG(kind)):  # such as a pipe, for which it would wait for ever
        raise ValueError(f"{path} is no regular file; a JSON file is needed")
    try:
        with path.open("rb") as file:
            return parse_json(file.read(LIMIT_BYTES + 1), path, lenient)
    except ValueError:
        if stat.S_ISREG(kind):
            check_format(path, JSON)  # which knows more of some
        raise


def read_json(path: Path, lenient: bool = False, pipe: bool = False) -> dict[str, Any]:
    """`read_json_value` of a file that holds an object; else ValueError."""
    values = read_json_value(path, lenient, pipe)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, not a JSON object")
    return values


def check_schema(values: Any, schema: Schema, source: object, top: str = "") -> None:
    """Raise a one-line ValueError that names the first place where ``values`` differ.

    top: where in the source ``values`` stand, if they are not all of it.
    """
    for place, keys in schema.items():
        for name, value in _at(values, place, source, top):
            _check_object(f"{source}: {name}" if name else str(source), value, keys)


def is_file_name(value: Any) -> bool:
    """Whether a value names a file in a directory itself, on every system: no way to another one,
    no drive, no stream, and nothing that a terminal takes for a command."""
    return (
        isinstance(value, str)
        and 0 < len(value.encode("utf-8", "surrogatepass")) <= 255
        and value not in (".", "..")
        and value.isprintable()
        and not re.search(r'[/\\:*?"<>|]|[ .]$', value)
    )


def _check_depth(data: bytes) -> None:
    """Before anything is parsed: what is deeper ends in a RecursionError there or later."""
    if data.count(b"[") + data.count(b"{") <= DEPTH:
        return
    # Escapes are dropped first, then every second part between quotation marks is a string.
    outside = b"".join(data.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2])
    depth = 0
    for bracket in outside.translate(None, _NO_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > DEPTH:
            raise ValueError(f"is nested deeper than the {DEPTH} levels that are read of JSON")


def _whole(text: str) -> int:
    value = _any_whole(text)
    if not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"the number {shown(text)[1:-1]} has more than 64 bits")
    return value


def _any_whole(text: str) -> int:
    if len(text) > DIGITS:  # read in a time that grows with their square
        raise ValueError(f"the number {shown(text)[1:-1]} has more than {DIGITS} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {shown(text)[1:-1]} is too large")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"not valid JSON ({name} is no number there)")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)  # finite, as `parse_json` has read it


_KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "line": lambda value: isinstance(value, str) and value.isprintable() and len(value) < 1000,
    "file name": is_file_name,
    "number": _is_number,
    "positive": lambda value: _is_number(value) and value > 0,
    "integer": _is_whole,
    "count": lambda value: _is_whole(value) and value >= 0,
    "bool": lambda value: isinstance(value, bool),
    "object": lambda value: isinstance(value, dict),
    "list": lambda value: isinstance(value, list),
}


def _is_of(value: Any, kind: str | tuple[Any, ...]) -> bool:
    if isinstance(kind, tuple):
        return any(type(value) is type(allowed) and value == allowed for allowed in kind)
    if kind.endswith("?"):
        return value is None or _is_of(value, kind[:-1])
    if kind.endswith("[]"):
        return isinstance(value, list) and all(_is_of(entry, kind[:-2]) for entry in value)
    return any(_KINDS[name](value) for name in kind.split("|"))


def _at(values: Any, place: str, source: object, top: str) -> Iterator[tuple[str, Any]]:
    """Every value at ``place``, with its own name; null, and a key that is missing, have none."""
    found = [(top, values)]
    for part in place.split(".") if place else ():
        key, many = re.fullmatch(r"(.*?)(\[\]|\{\})?", part).groups()  # pyright: ignore[reportOptionalMemberAccess]
        following: list[tuple[str, Any]] = []
        for name, value in found:
            if not isinstance(value, dict):
                raise ValueError(
                    f"{source}: {name} is no object" if name else f"{source} is no object"
                )
            if (held := value.get(key)) is None:
                continue
            child = f"{name}.{key}" if name else key
            if many is None:
                following.append((child, held))
            elif many == "[]" and isinstance(held, list):
                following += [(f"{child}[{i}]", entry) for i, entry in enumerate(held)]
            elif many == "{}" and isinstance(held, dict):
                following += [(f"{child}[{shown(i)}]", entry) for i, entry in held.items()]
            else:
                raise ValueError(f"{source}: {child} is no {'list' if many == '[]' else 'object'}")
        found = following
    yield from found


def _check_object(where: str, value: Any, keys: Mapping[str, str | tuple[Any, ...]]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no object")
    for key, kind in keys.items():
        if key.startswith("<"):
            for name in value:
                if not _is_of(name, key[1:-1]):
                    raise ValueError(f"{where} has {shown(name)}, which is no {key[1:-1]}")
            named = list(value)
        else:
            optional, key = key.endswith("?"), key.removesuffix("?")
            if key not in value and not optional:
                raise ValueError(f"{where} has no {key!r}")
            named = [key] if key in value else []
        for name in named:
            if not _is_of(value[name], kind):
                raise ValueError(f"{where}: {shown(name)} is {_told(value[name], kind)}")


def _told(value: Any, kind: str | tuple[Any, ...]) -> str:
    if isinstance(kind, tuple):
        return f"{shown(value)}, not one of {', '.join(map(repr, kind))}"
    value_too = "" if value is None else f" ({shown(value)})"
    return f"{type(value).__name__}, not {kind.removesuffix('?')}{value_too}"
