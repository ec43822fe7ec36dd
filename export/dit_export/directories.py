"""Directories that appear whole or not at all, and of which one process at a time has the use."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


def check_destination(target: Path, replaceable: Callable[[Path], str | None]) -> None:
    """Raise a one-line ValueError unless ``target`` is free, empty, or may be replaced.

    replaceable: given a directory that holds something, why it must stay; None to replace it.
    """
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink() or not target.is_dir():
        raise ValueError(f"{target}: exists and is no directory; nothing was written")
    if any(target.iterdir()) and (reason := replaceable(target)) is not None:
        raise ValueError(f"{target}: {reason}; nothing was written")


@contextmanager
def new_directory(
    target: Path, replaceable: Callable[[Path], str | None] = lambda _: "holds something else"
) -> Iterator[Path]:
    """Yield an empty neighbour of ``target`` that takes its name once the block ends well.

    If the block raises, nothing is left of the neighbour, and ``target`` is as it was. What is
    replaced keeps its place until the new directory is complete.

    Raises:
        ValueError: see `check_destination`.
        OSError: it cannot be written.
    """
    target = target.absolute()
    check_destination(target, replaceable)
    target.parent.mkdir(parents=True, exist_ok=True)
    stem = f".{target.name}.{secrets.token_hex(4)}"
    partial, old = target.with_name(f"{stem}.partial"), target.with_name(f"{stem}.old")
    try:
        partial.mkdir()
        yield partial
        check_destination(target, replaceable)  # another process may have been quicker
        _exchange(target, partial, old)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process (or thread) at a time for a file or directory that exists; the others wait.

    No lock where the system has no flock.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # and with it goes the lock


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """An empty directory beside ``target``, gone when the block ends, for what it is made of.

    It may take several GB, so that it must not lie in /tmp, which memory may hold.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        yield Path(folder)


def _exchange(target: Path, new: Path, old: Path) -> None:
    # No system call exchanges two directories everywhere, so there are two renames, and an
    # exception (a KeyboardInterrupt too) may arrive between them.
    try:
        if target.exists():
            target.rename(old)
        new.rename(target)
    finally:
        if old.exists():
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(target)
