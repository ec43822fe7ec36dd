"""Write directories complete or not at all, and replace only files that we wrote earlier."""

from __future__ import annotations

import glob
import os
import stat
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import NoReturn

from dit_engine.io.files import NAME_SHOWN, file_hash, hidden_directory, told_as
from dit_engine.io.printable import some_of

Known = Callable[[Path], Mapping[str, "str | None"]]
"""A function that is given a directory with files in it and returns those that may be removed:
relative path → SHA-256, or None where the name alone decides. If the directory must stay, it raises
ValueError with the reason.

The paths must come from a fixed list of names that we write: a stranger's manifest may list any."""

_LEFT_SECONDS = 60.0  # after which a directory counts as left by a killed process


def nothing_known(directory: Path) -> NoReturn:
    """A `Known` for a destination that must be missing or empty."""
    raise ValueError(f"holds something else ({_some(p.name for p in directory.iterdir())})")


def check_destination(target: Path, known: Known = nothing_known) -> dict[str, os.stat_result]:
    """The regular files that must be removed to write a new ``target``, by relative path.

    Raises a one-line ValueError unless ``target`` is missing, an empty directory, or a directory
    with nothing but regular files that ``known`` lists, with the hashes that it lists. It may be a
    link to such a directory, unless another user made the link.
    """
    target = _behind_link(target)
    if not target.exists() and not target.is_symlink():
        return {}
    if _holds_current(target):
        raise ValueError(
            f"{target}: is the current directory or one above it, which stays: name another; "
            "nothing was written"
        )
    if target.is_symlink() or not target.is_dir():
        raise ValueError(f"{target}: exists and is not a directory; nothing was written")
    if not any(target.iterdir()):
        return {}
    try:
        return _removable(target, known(target))
    except ValueError as error:
        raise ValueError(f"{target}: {error}; nothing was written") from None


def _holds_current(target: Path) -> bool:
    try:
        here = Path.cwd()
    except OSError:  # it was removed
        return False
    return target.resolve() in (here, *here.parents)


@contextmanager
def new_directory(target: Path, known: Known = nothing_known) -> Iterator[Path]:
    """Yield an empty directory, which is renamed to ``target`` when the block ends.

    The path is this process's own (`hidden_directory`): no other process can use it.

    If the block raises, the directory is removed and ``target`` stays as it was. An earlier
    ``target`` stays in its place until the new directory is complete. (A process that is killed at
    that moment may leave the earlier one as ``.NAME.TOKEN.old``.)

    Raises:
        ValueError: see `check_destination`.
        OSError: the directory cannot be written.
    """
    target = _behind_link(target.absolute())
    check_destination(target, known)
    _name_leftovers(target)
    with _parents(target), hidden_directory(target) as (folder, held):
        new = held / "new.partial"
        with told_as(new, target):
            new.mkdir()
            yield new
            removable = check_destination(target, known)  # files may have been added meanwhile
            _exchange(target, new, folder.with_suffix(".old"), removable)


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """An empty directory beside ``target`` for intermediate files, removed when the block ends.

    It may hold several GB, so it must not be in /tmp, which may be kept in memory. As in
    `new_directory`, no other process can use the path.
    """
    target = _behind_link(target.absolute())
    with _parents(target), hidden_directory(target) as (folder, held), told_as(held, folder):
        yield held


def _behind_link(target: Path) -> Path:
    """The directory to which ``target`` leads if it is a link of this user or of root; else
    ``target``. Raises ValueError for another user's link, and for one to no directory."""
    place = target
    while place.is_symlink():
        if not target.is_dir():
            raise ValueError(f"{target}: is a link to no directory; nothing was written")
        owner = place.lstat().st_uid
        if hasattr(os, "geteuid") and owner not in (os.geteuid(), 0):
            raise ValueError(
                f"{target}: is a link that user {owner} made: name the directory itself; nothing "
                "was written"
            )
        place = place.parent / place.readlink()
    return target if place == target else target.resolve()


def _name_leftovers(target: Path) -> None:
    """Warn of directories that killed processes left beside ``target``; they may be large."""
    names: list[str] = []
    start = glob.escape(f".{target.name[:NAME_SHOWN]}.")
    with suppress(OSError):
        for path in target.parent.glob(f"{start}{'[0-9a-f]' * 16}.partial"):
            facts = path.lstat()
            mine = not hasattr(os, "geteuid") or facts.st_uid == os.geteuid()
            if mine and facts.st_mtime < time.time() - _LEFT_SECONDS:
                names.append(path.name)
    if names:
        warnings.warn(
            f"{target.parent} holds what an ended process left there ({_some(names)}): remove it, "
            "unless another process is writing there now",
            stacklevel=4,
        )


@contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Make the directories above ``target``; afterwards remove those of them that are empty."""
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for parent in missing:
            with suppress(OSError):  # it is not empty
                parent.rmdir()


def _removable(directory: Path, known: Mapping[str, str | None]) -> dict[str, os.stat_result]:
    """The files of a directory; ValueError unless all are known. Links are not followed."""

    def failed(error: OSError) -> None:
        raise error

    folders = {str(parent) for name in known for parent in PurePosixPath(name).parents}
    files: dict[str, os.stat_result] = {}
    others: list[str] = []
    links: list[str] = []
    for root, subfolders, names in os.walk(directory, onerror=failed):
        for entry in (*subfolders, *names):
            path = Path(root, entry)
            name, state = path.relative_to(directory).as_posix(), path.lstat()
            if stat.S_ISDIR(state.st_mode):
                if name not in folders and not any(path.iterdir()):
                    others.append(name)
            elif stat.S_ISREG(state.st_mode) and (name in known or _source(name) in known):
                files[name] = state
            elif stat.S_ISLNK(state.st_mode) and (name in known or name in folders):
                links.append(name)
            else:
                others.append(name)
    if others:
        raise ValueError(
            f"also holds what was not made with it ({_some(others)}): move that elsewhere"
        )
    if links:
        raise ValueError(
            f"holds links ({_some(links)}), and only regular files are replaced: move the links "
            "elsewhere, or name another directory"
        )
    for name in files:
        if known.get(name) not in (None, file_hash(directory / name)):
            raise ValueError(
                f"its {name} has changed since it was written: move that elsewhere, or name "
                "another directory"
            )
    return files


def _source(name: str) -> str | None:
    """The source of a file that Python compiled; None if ``name`` is not a compiled file."""
    path = PurePosixPath(name)
    if path.parent.name != "__pycache__" or path.suffix != ".pyc":
        return None
    return str(path.parent.with_name(f"{path.name.partition('.')[0]}.py"))


def _some(names: Iterable[str]) -> str:
    return some_of(sorted(names), quote=False)


def _exchange(target: Path, new: Path, old: Path, removable: dict[str, os.stat_result]) -> None:
    """Rename ``new`` to ``target``; the earlier target is kept as ``old`` until that is done.

    No system call exchanges two directories on every system, so there are two renames, and an
    exception such as KeyboardInterrupt may come between them.
    """
    try:
        if target.exists():
            target.rename(old)
        new.rename(target)
    finally:
        if old.exists() and not target.exists():
            try:
                old.rename(target)
            except OSError as error:
                raise OSError(
                    f"{target}: not written, and the earlier model is now {old} ({error})"
                ) from None
        if old.exists():
            _remove(old, removable)


def _remove(directory: Path, removable: dict[str, os.stat_result]) -> None:
    """Remove the files that have not changed since they were checked, then the empty directories.

    Files that were added or changed meanwhile stay, and a warning says where.
    """

    def same(a: os.stat_result, b: os.stat_result | None) -> bool:
        facts = ("st_dev", "st_ino", "st_mode", "st_size", "st_mtime_ns")
        return b is not None and all(getattr(a, f) == getattr(b, f) for f in facts)

    folders = {parent for name in removable for parent in PurePosixPath(name).parents}
    for root, subfolders, names, opened in _walk_up(directory):
        # By its name in an open directory: nobody can put a link in the place of a folder.
        base = root if opened is None else Path()
        below = PurePosixPath(root.relative_to(directory).as_posix())
        for entry in names:
            with suppress(OSError):
                here = os.stat(base / entry, dir_fd=opened, follow_symlinks=False)
                if same(here, removable.get(str(below / entry))):
                    os.unlink(base / entry, dir_fd=opened)
        for entry in subfolders:
            if below / entry in folders:
                with suppress(OSError):
                    os.rmdir(base / entry, dir_fd=opened)
    with suppress(OSError):
        directory.rmdir()
    if directory.exists():
        warnings.warn(f"{directory} is left: it holds what was not made here", stacklevel=2)


def _walk_up(directory: Path) -> Iterator[tuple[Path, list[str], list[str], int | None]]:
    """Every directory, after those in it, and its descriptor on systems that have them."""
    with suppress(OSError):  # it is gone by now
        if hasattr(os, "fwalk"):
            for root, folders, names, opened in os.fwalk(directory, topdown=False):
                yield Path(root), folders, names, opened
        else:
            for root, folders, names in os.walk(directory, topdown=False):
                yield Path(root), folders, names, None
