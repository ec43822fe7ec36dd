"""Record the names of files, not their paths, which would describe the user's machine."""

from __future__ import annotations

import os
import re
from pathlib import Path, PureWindowsPath
from typing import Any

# Matches the directories of a path that begins with a slash, "~", ".", ".." or a drive. It does not
# match network addresses, or slashes between words ("and/or"). After a quotation mark, the path may
# have spaces.
_PLAIN = r"[^/\\\s'\"`:;,|<>()\[\]{}]"
_DIRECTORIES = re.compile(
    rf"(?<=')(?:~|\.{{1,2}}|[A-Za-z]:)?[/\\](?:[^/\\'\n]+[/\\])+(?=[^/\\'\n]*')"
    rf"|(?<![\w:/\\.~+-])(?:~|\.{{1,2}}|[A-Za-z]:)?[/\\](?:{_PLAIN}+[/\\])+"
)


def recorded(source: str | Path) -> str:
    """The name that is recorded for ``source``: the last part of a path, or a whole hub id."""
    text = str(source)
    exists = os.path.exists(text)  # noqa: PTH110 (which raises nothing for a name that is too long)
    if not (_is_path(text) or isinstance(source, Path) or exists):
        return text
    name = Path(text).absolute().name
    return Path(text).resolve().name if name == ".." else name or text


def same_source(one: str, other: str) -> bool:
    """Whether two recorded sources may be the same; each may be a path or only its last part."""
    return one == other or _last(one) == _last(other)


def is_source(source: str | Path, record: str) -> bool:
    """Whether ``source`` may be what ``record`` names, a name or, in older records, a path."""
    return same_source(recorded(source), record)


def without_paths(value: Any) -> Any:
    """A copy of a JSON value in which the paths in strings are cut to the names of the files."""
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


def _is_path(text: str) -> bool:
    return bool(re.match(r"~|\.{1,2}([/\\]|$)|/\S|\\\\|[A-Za-z]:[/\\]", text))


def _last(text: str) -> str:
    return PureWindowsPath(text).name  # splits at / and \, so it works for the paths of all systems
