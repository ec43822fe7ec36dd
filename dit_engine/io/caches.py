"""Find the directories that keep results between processes, and check that they can be trusted.

Whoever can write into a cache can run code as this user: torch unpickles graphs and loads kernels
from it, and TensorRT engines are machine code.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from shlex import quote

VARIABLE = "DIT_ENGINE_CACHE"
_ELSEWHERE = f"set {VARIABLE} to another directory"


def cache_directory() -> Path:
    """$DIT_ENGINE_CACHE, or dit-engine in the user's cache directory; it need not exist.

    A relative $XDG_CACHE_HOME is ignored, as its specification demands: it would be in the current
    directory. Raises ValueError if there is no home directory either.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        if given := os.environ.get(VARIABLE):
            return Path(given).expanduser()
        return (base if base.is_absolute() else Path.home() / ".cache") / "dit-engine"
    except RuntimeError as error:
        raise ValueError(f"no place for a cache: {error} Set {VARIABLE} to a directory") from None


def private_cache(*names: str) -> Path:
    """The directory names[0]/names[1]/… in `cache_directory`; each is a `private_directory`."""
    path = cache_directory()
    try:
        path = private_directory(path)
        for name in names:
            path = private_directory(path / name)
    except OSError as error:
        place = error.filename or path
        raise type(error)(
            f"{place}: {error.strerror}; set {VARIABLE} to a directory of yours"
        ) from None
    return path


def private_directory(path: Path) -> Path:
    """``path`` as an absolute path; missing directories are made, with mode 0700.

    Raises a one-line ValueError if it is not a directory or if others own it or may write in it
    (also for root, who would run what they put there), OSError if it cannot be made.
    """
    path = path.expanduser().absolute()
    missing = list(takewhile(lambda place: not os.path.lexists(place), (path, *path.parents)))
    for place in reversed(missing):
        with suppress(FileExistsError):  # another process made it; its owner is checked below
            place.mkdir(mode=0o700)
    if not path.is_dir():
        raise ValueError(f"{path}: is not a directory; remove it, or {_ELSEWHERE}")
    for place in missing or [path]:
        if (reason := why_not_private(place)) is not None:
            raise ValueError(f"{place}: {reason}")
    return path


def why_not_private(path: Path) -> str | None:
    """Why another user, except root, could have made or changed ``path``, and what to do about it;
    None if no other user could, and on systems without such owners and modes (Windows)."""
    if not hasattr(os, "geteuid"):
        return None
    user = os.geteuid()
    for place in _way(path.absolute()):
        facts = place.lstat()
        mode = stat.S_IMODE(facts.st_mode)
        if stat.S_ISLNK(facts.st_mode):
            if facts.st_uid not in (user, 0):
                return f"user {facts.st_uid} made the link {place}; {_ELSEWHERE}"
        elif mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            # With the sticky bit, as in /tmp, only the owner of a file may rename it.
            return (
                f"anyone may write in {place} (mode {mode:o}); run chmod o-w {quote(str(place))}, "
                f"or {_ELSEWHERE}"
            )
    facts = path.stat()
    if facts.st_uid != user:
        return f"it belongs to user {facts.st_uid}, and you are user {user}; {_ELSEWHERE}"
    if (mode := stat.S_IMODE(facts.st_mode)) & (stat.S_IWGRP | stat.S_IWOTH):
        reason = f"others may write in it (mode {mode:o})"
        return f"{reason}; run chmod go-w {quote(str(path))}, or {_ELSEWHERE}"
    return None


def _way(path: Path) -> Iterator[Path]:
    """Every directory and link from the root to an existing ``path``, also behind its links."""
    place, parts = Path(path.anchor), list(path.parts[1:])
    while parts:
        yield place
        name = parts.pop(0)
        if name == "..":
            place = place.parent
        elif not (place / name).is_symlink():
            place /= name
        else:
            yield place / name
            target = (place / name).readlink()
            place = Path(target.anchor) if target.is_absolute() else place
            parts[:0] = target.parts[target.is_absolute() :]
    yield place
