"""What records say of files: their names, and not where on somebody's machine they lie."""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath
from typing import Any

# The directories of a path that begins with a slash, "~", ".", ".." or a drive; no address of a
# network, no "or" between words. Where a quotation mark stands before it, spaces are a part of it.
_PLAIN = r"[^/\\\s'\"`:;,|<>()\[\]{}]"
_DIRECTORIES = re.compile(
    rf"(?<=')(?:~|\.{{1,2}}|[A-Za-z]:)?[/\\](?:[^/\\'\n]+[/\\])+(?=[^/\\'\n]*')"
    rf"|(?<![\w:/\\.~+-])(?:~|\.{{1,2}}|[A-Za-z]:)?[/\\](?:{_PLAIN}+[/\\])+"
)


def recorded(source: str | Path) -> str:
    """What a record says of the file, directory or hub id ``source``: of paths the last part."""
    text = str(source)
    if not (_is_path(text) or isinstance(source, Path) or _exists(text)):
        return text
    name = Path(text).absolute().name
    return Path(text).resolve().name if name == ".." else name or text


def same_source(one: str, other: str) -> bool:
    """Whether two entries of records may be of one source: either may have a path or its name."""
    return one == other or _last(one) == _last(other)


def is_source(source: str | Path, record: str) -> bool:
    """Whether ``record`` may be what was `recorded` of ``source``, or its path."""
    return same_source(recorded(source), record)


def without_paths(value: Any) -> Any:
    """A JSON value in whose texts the paths of files are their names."""
    if isinstance(value, dict):
        return {key: without_paths(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(each) for each in value]
    if not isinstance(value, str):
        return value
    if option := re.match(r"--[\w-]+=", value):
        return option[0] + without_paths(value[option.end() :])
    if _is_path(value) and "\n" not in value and ": " not in value:
        return _last(value) or value
    return _DIRECTORIES.sub("", value)


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:  # of a name that is too long, or where one may not look
        return False


def _is_path(text: str) -> bool:
    return bool(re.match(r"~|\.{1,2}([/\\]|$)|/\S|\\\\|[A-Za-z]:[/\\]", text))


def _last(text: str) -> str:
    return PureWindowsPath(text).name  # of paths of all systems
