"""Write directories complete or not at all, and replace only files that we wrote earlier."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import NoReturn

from dit_engine.io.files import file_hash, hidden_directory, told_as
from dit_engine.io.printable import some_of

Known = Callable[[Path], Mapping[str, "str | None"]]
"""Returns the files of a directory that may be removed: relative path → SHA-256, or None where the
name alone decides. Raises ValueError with the reason if the directory must stay. The paths must be
from a fixed list of names that we write: a stranger's manifest may list any."""

Facts = tuple[int, ...]  # by which `_remove` recognises a file


def nothing_known(directory: Path) -> NoReturn:
    """A `Known` for a destination that must be missing or empty."""
    raise ValueError(f"holds something else ({_some(p.name for p in directory.iterdir())})")


def check_destination(target: Path, known: Known = nothing_known) -> dict[str, Facts]:
    """The regular files that must be removed to write a new ``target``, by relative path.

    Raises a one-line ValueError unless ``target`` is missing, empty, or a directory with nothing
    but regular files that ``known`` lists, with the hashes that it lists. It may be a link to such
    a directory, unless another user made the link.
    """
    target = _behind_link(target)
    if not target.exists():
        return {}
    try:
        with suppress(OSError):  # the current directory may have been removed
            if target.resolve() in (Path.cwd(), *Path.cwd().parents):
                raise ValueError("is the current directory or one above it: name another")
        if not target.is_dir():
            raise ValueError("exists and is not a directory")
        return _removable(target, known(target)) if any(target.iterdir()) else {}
    except ValueError as error:
        raise ValueError(f"{target}: {error}; nothing was written") from None


@contextmanager
def new_directory(target: Path, known: Known = nothing_known) -> Iterator[Path]:
    """Yield an empty directory, which is renamed to ``target`` when the block ends.

    Only this process can use the path (`hidden_directory`). If the block raises, the directory is
    removed. An earlier ``target`` stays in its place until the new directory is complete. (A
    process that is killed at that moment may leave the earlier one as ``.NAME.TOKEN.old``.)

    Raises ValueError as `check_destination` does, OSError if the directory cannot be written.
    """
    target = _behind_link(target.absolute())
    check_destination(target, known)
    with _parents(target), hidden_directory(target) as (folder, held):
        new = held / "new.partial"
        with told_as(new, target):
            new.mkdir()
            yield new
            removable = check_destination(target, known)  # files may have been added meanwhile
            _exchange(target, new, folder.with_suffix(".old"), removable)


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """An empty directory for intermediate files, removed when the block ends. They may have several
    GB, so it is beside ``target`` and not in /tmp, which may be kept in memory."""
    target = _behind_link(target.absolute())
    with _parents(target), hidden_directory(target) as (folder, held), told_as(held, folder):
        yield held


def _behind_link(target: Path) -> Path:
    """The directory to which ``target`` leads if it is a link of this user or of root."""
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


@contextmanager
def _parents(target: Path) -> Iterator[None]:
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for parent in missing:
            with suppress(OSError):  # it is not empty
                parent.rmdir()


def _removable(directory: Path, known: Mapping[str, str | None]) -> dict[str, Facts]:
    def failed(error: OSError) -> None:
        raise error

    folders = {str(parent) for name in known for parent in PurePosixPath(name).parents}
    files: dict[str, Facts] = {}
    others: list[str] = []
    for root, subfolders, names in os.walk(directory, onerror=failed):
        for entry in (*subfolders, *names):
            path = Path(root, entry)
            name, state = path.relative_to(directory).as_posix(), path.lstat()
            if stat.S_ISREG(state.st_mode) and (name in known or _source(name) in known):
                files[name] = _facts(state)
            elif not stat.S_ISDIR(state.st_mode) or (
                name not in folders and not any(path.iterdir())
            ):
                others.append(name)
    if others:
        raise ValueError(
            f"also holds what was not made with it ({_some(others)}): move that elsewhere, or name "
            "another directory (only regular files are replaced, and no links)"
        )
    for name in files:
        if known.get(name) not in (None, file_hash(directory / name)):
            raise ValueError(
                f"its {name} has changed since it was written: move that elsewhere, or name "
                "another directory"
            )
    return files


def _facts(state: os.stat_result) -> Facts:
    return state.st_dev, state.st_ino, state.st_mode, state.st_size, state.st_mtime_ns


def _source(name: str) -> str:
    """The source of a file that Python compiled; "" if ``name`` is not a compiled file."""
    path = PurePosixPath(name)
    if path.parent.name != "__pycache__" or path.suffix != ".pyc":
        return ""
    return str(path.parent.with_name(f"{path.name.partition('.')[0]}.py"))


def _some(names: Iterable[str]) -> str:
    return some_of(sorted(names), quote=False)


def _exchange(target: Path, new: Path, old: Path, removable: dict[str, Facts]) -> None:
    # No system call exchanges two directories on every system, so there are two renames, and an
    # exception such as KeyboardInterrupt may come between them.
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


def _remove(directory: Path, removable: dict[str, Facts]) -> None:
    """Remove the files that have not changed since they were checked, then empty directories."""
    folders = {str(parent) for name in removable for parent in PurePosixPath(name).parents}
    walk = getattr(os, "fwalk", os.walk)
    with suppress(OSError):  # it is gone by now
        for root, subfolders, names, *opened in walk(directory, topdown=False):
            # By its name in an open directory, so nobody can put a link in the place of a folder.
            base, place = (Path(), opened[0]) if opened else (Path(root), None)
            below = Path(root).relative_to(directory)
            for entry in names:
                with suppress(OSError):
                    here = os.stat(base / entry, dir_fd=place, follow_symlinks=False)
                    if _facts(here) == removable.get((below / entry).as_posix()):
                        os.unlink(base / entry, dir_fd=place)
            for entry in subfolders:
                if (below / entry).as_posix() in folders:
                    with suppress(OSError):
                        os.rmdir(base / entry, dir_fd=place)
    with suppress(OSError):
        directory.rmdir()
    if directory.exists():
        warnings.warn(f"{directory} is left: it holds what was not made here", stacklevel=2)
