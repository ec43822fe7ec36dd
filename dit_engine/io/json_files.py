"""Read JSON that others wrote, within limits, and check it against a schema.

A schema maps a place to the keys that an object there has, and each key to the kind of its value:

>>> {"": {"format": "integer", "files": "object"},
...  "files": {"<file name>": "object"},
...  "files{}": {"bytes": "count", "sha256": "text", "note?": "text?"},
...  "graphs[]": {"shape": "count|text[]", "dtype": ("fp32", "fp16")}}

The place "" is the value itself, a place that ends in "[]" is every entry of a list, and one that
ends in "{}" is every value of an object. A key that ends in "?" may be missing. The key "<kind>"
stands for all keys of an object: each of them must be of that kind.

In a kind, "|" means "or", "[]" a list of such values, and "?" at the end allows null. A tuple holds
the allowed values themselves. A "line" is a printable text of less than 1000 characters. Keys that
the schema does not name are allowed.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dit_engine.arguments import shown
from dit_engine.io.formats import JSON, check_format

DEPTH = 64  # most levels of lists and objects; our files and those of hubs have less than ten
LIMIT_BYTES = 16 * 2**20  # of a text; parsed, "[{},{},…" takes twenty times its size in memory
DIGITS = 1000  # of one number
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

Schema = Mapping[str, Mapping[str, "str | tuple[Any, ...]"]]


def parse_json(text: str | bytes, source: object, lenient: bool = False) -> Any:
    """The value of a JSON text. If a key occurs twice in an object, the last one counts.

    Integers must fit into 64 bits, other numbers must be finite, and strings must be valid Unicode.
    ``lenient`` also accepts NaN, Infinity, integers of up to `DIGITS` digits, and lone surrogates
    (which Python writes for the bytes of a path that are not UTF-8); the caller must then check
    every value that it uses.

    Raises ValueError, one line that names ``source``, for everything else.
    """
    try:
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        if len(data) > LIMIT_BYTES:
            raise ValueError(f"has more than the {LIMIT_BYTES >> 20} MiB that are allowed")
        _check_depth(data)
        values = json.loads(
            data.decode("utf-8", "surrogatepass" if lenient else "strict"),
            parse_int=partial(_whole, lenient=lenient),
            parse_float=None if lenient else _finite,
            parse_constant=None if lenient else _finite,  # NaN and Infinity
        )
        if not lenient and _SURROGATE.search(data):
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{source}: a string in it holds half of a surrogate pair") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: not valid JSON ({error})") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return values


def read_json_value(path: Path, lenient: bool = False, pipe: bool = False) -> Any:
    """`parse_json` of a file; pipe: also accept a pipe or a device, such as /dev/stdin."""
    try:
        kind = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} does not exist; a JSON file is needed") from None
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(f"{path} is a directory; a JSON file is needed")
    if not (pipe or stat.S_ISREG(kind)):  # reading a pipe could wait for ever
        raise ValueError(f"{path} is not a regular file; a JSON file is needed")
    try:
        with path.open("rb") as file:
            return parse_json(file.read(LIMIT_BYTES + 1), path, lenient)
    except ValueError:
        if stat.S_ISREG(kind):
            check_format(path, JSON)  # its message is better where it recognises the file
        raise


def read_json(path: Path, lenient: bool = False) -> dict[str, Any]:
    """`read_json_value` of a file that holds an object; else ValueError."""
    values = read_json_value(path, lenient)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, not a JSON object")
    return values


def check_schema(values: Any, schema: Schema, source: object, top: str = "") -> None:
    """Raise a one-line ValueError for the first value that does not fit the schema.

    top: the place of ``values`` in the source, for messages, if they are only a part of it.
    """
    for place, keys in schema.items():
        for where, value in _at(values, place.split(".") if place else [], source, top):
            _check_object(where, value, keys)


def is_file_name(value: Any) -> bool:
    """Whether a value is the name of a file on every system, without a directory or escapes."""
    return (
        isinstance(value, str)
        and 0 < len(value.encode("utf-8", "surrogatepass")) <= 255
        and value not in (".", "..")
        and value.isprintable()
        and not re.search(r'[/\\:*?"<>|]|[ .]$', value)
    )


def _check_depth(data: bytes) -> None:
    # Before the text is parsed, because parsing it or using its value could end in RecursionError.
    if data.count(b"[") + data.count(b"{") <= DEPTH:
        return
    # Without escaped characters, every second part between quotation marks is a string.
    outside = b"".join(data.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2])
    depth = 0
    for bracket in outside.translate(None, _NO_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > DEPTH:
            raise ValueError(f"is nested deeper than the {DEPTH} levels that are allowed")


def _whole(text: str, lenient: bool = False) -> int:
    if len(text) > DIGITS:  # int() takes a time that grows with the square of the length
        raise ValueError(f"the number {shown(text)[1:-1]} has more than {DIGITS} digits")
    if not (lenient or -(1 << 63) <= int(text) < 1 << 64):
        raise ValueError(f"the number {shown(text)[1:-1]} has more than 64 bits")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"the number {shown(text)[1:-1]} is not finite")
    return float(text)


def _is_a(value: Any, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "line": lambda value: isinstance(value, str) and value.isprintable() and len(value) < 1000,
    "file name": is_file_name,
    "number": lambda value: _is_a(value, int, float),  # finite, as `parse_json` has read it
    "positive": lambda value: _is_a(value, int, float) and value > 0,
    "integer": lambda value: _is_a(value, int),
    "count": lambda value: _is_a(value, int) and value >= 0,
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


def _at(value: Any, parts: list[str], source: object, name: str) -> Iterator[tuple[str, Any]]:
    """Place and value of everything at a place. Keys that are missing or null are skipped."""
    where = f"{source}: {name}" if name else str(source)
    if not parts:
        yield where, value
        return
    many = parts[0][-2:] if parts[0].endswith(("[]", "{}")) else ""
    key = parts[0].removesuffix(many)
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not an object")
    if (held := value.get(key)) is None:
        return
    child = f"{name}.{key}" if name else key
    if not many:
        yield from _at(held, parts[1:], source, child)
    elif not isinstance(held, list if many == "[]" else dict):
        raise ValueError(f"{source}: {child} is not {'a list' if many == '[]' else 'an object'}")
    else:
        for i, entry in held.items() if isinstance(held, dict) else enumerate(held):
            yield from _at(entry, parts[1:], source, f"{child}[{shown(i)}]")


def _check_object(where: str, value: Any, keys: Mapping[str, str | tuple[Any, ...]]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not an object")
    for key, kind in keys.items():
        names = [key.removesuffix("?")]
        if key.startswith("<"):
            names = list(value)
            if wrong := [name for name in names if not _is_of(name, key[1:-1])]:
                raise ValueError(f"{where} has {shown(wrong[0])}, which is not a {key[1:-1]}")
        elif names[0] not in value:
            if key == names[0]:
                raise ValueError(f"{where} has no {key!r}")
            continue
        for name in names:
            held = value[name]
            if _is_of(held, kind):
                continue
            if isinstance(kind, tuple):
                told = f"{shown(held)}, not one of {', '.join(map(repr, kind))}"
            else:
                told = f"{type(held).__name__}, not {kind.removesuffix('?')}"
                told += "" if held is None else f" ({shown(held)})"
            raise ValueError(f"{where}: {shown(name)} is {told}")
