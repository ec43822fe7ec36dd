"""Write files complete or not at all, and never through another user's link."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_NAME_SHOWN = 48  # characters of 4 bytes at most; a whole file name may have 255 bytes
_NO_LINKS: int = getattr(os, "O_NOFOLLOW", 0)  # Windows has none of these
_DIRECTORY: int = getattr(os, "O_DIRECTORY", 0)
_NO_WAITING: int = getattr(os, "O_NONBLOCK", 0)  # opening a pipe would wait for its other end


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path; the file written there is renamed to ``path`` when the block ends.

    If the block raises, ``path`` stays as it was. A link is replaced, and its target stays as it
    is. The temporary file is in a `hidden_directory`, so it may be opened by name more than once.

    Raises OSError if the file cannot be written, or if ``path`` is a device or a pipe.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "Is a device or a pipe, which no file may replace", str(path))
    whole = path.absolute()  # the block may change the current directory
    with hidden_directory(path) as (_, held):
        partial = held / f".{whole.name}.partial"  # without a picture's suffix
        with told_as(partial, path):
            yield partial
            partial.replace(whole)


@contextmanager
def told_as(inside: Path, path: Path) -> Iterator[None]:
    """Errors that are raised in the block name ``path`` and not ``inside``, the temporary path."""
    # (?!\w), because /proc/self/fd/7 is also the beginning of /proc/self/fd/70.
    temporary = re.escape(str(inside)) + r"(?!\w)"

    def told(text: object) -> str:
        return re.sub(temporary, lambda _: str(path), str(text))

    try:
        yield
    except Exception as error:
        named = getattr(error, "filename", None)
        if isinstance(error, OSError) and told(named) != str(named):
            raise OSError(error.errno, error.strerror, told(named)) from error
        error.args = tuple(told(a) if isinstance(a, str) else a for a in error.args)
        raise


@contextmanager
def hidden_directory(target: Path) -> Iterator[tuple[Path, Path]]:
    """An empty private directory beside ``target``, removed when the block ends.

    Its name, ``.NAME.TOKEN.partial``, cannot be guessed, so nobody can put a link there beforehand,
    and nobody else may write into it (mode 0700). A killed process leaves it behind.

    Yields two paths: its name, and one that stays valid if it is renamed, but only in this process.
    """
    name = f".{target.name[:_NAME_SHOWN]}.{secrets.token_hex(8)}.partial"
    folder = target.absolute().with_name(name)
    try:
        # On Windows, files made inside would inherit mode 0700 and keep it in their final place.
        folder.mkdir(0o700 if os.name == "posix" else 0o777)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from None
    made = folder.lstat()
    with _held(folder) as held:
        try:
            yield folder, held
        finally:
            with suppress(OSError):  # somebody may have renamed it
                for entry in held.iterdir() if os.path.samestat(made, held.stat()) else ():
                    if entry.is_dir() and not entry.is_symlink():
                        shutil.rmtree(entry, ignore_errors=True)
                    else:
                        entry.unlink()
                folder.rmdir()


@contextmanager
def _held(folder: Path) -> Iterator[Path]:
    """A path to the new directory ``folder`` that stays valid if others rename ``folder`` and put a
    directory with links in its place. On Linux, /proc has such a path for every open directory;
    elsewhere this is ``folder`` itself."""
    if not os.access("/proc/self/fd", os.X_OK):
        yield folder
        return
    descriptor = os.open(folder, os.O_RDONLY | _DIRECTORY | _NO_LINKS)
    try:
        owner = os.fstat(descriptor).st_uid
        if owner != os.geteuid() and owner != _owner_in(descriptor):
            raise OSError(errno.EEXIST, "Another user put something in its place", str(folder))
        open_one = Path(f"/proc/self/fd/{descriptor}")
        yield open_one if os.access(open_one, os.X_OK) else folder
    finally:
        os.close(descriptor)


def _owner_in(directory: int) -> int:
    """The owner of new files in an open directory; on some file systems that is another user."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINKS
    probe = os.open("probe", flags, dir_fd=directory)
    try:
        return os.fstat(probe).st_uid
    finally:
        os.close(probe)
        os.unlink("probe", dir_fd=directory)


def no_links(path: str, flags: int) -> int:
    """For ``open(path, …, opener=no_links)``: raises OSError if the file is a symbolic link."""
    if Path(path).is_symlink():  # a clear message; the flag below also works for a link made later
        raise OSError(errno.ELOOP, "Is a symbolic link, and nothing is written through links", path)
    return os.open(path, flags | _NO_LINKS, 0o666)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a directory or a file, which is made if it is missing and must not
    be a link (OSError). Where the system has no flock, as on Windows, nothing is locked."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    if path.is_dir():
        descriptor = os.open(path, os.O_RDONLY)
    else:
        descriptor = no_links(str(path), os.O_RDONLY | os.O_CREAT | _NO_WAITING)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # which also releases the lock


def check_regular(path: Path) -> None:
    """Raise a one-line ValueError unless ``path`` is a regular file. Links are refused because in
    files from others they could point to any file of this user."""
    if path.is_symlink():
        raise ValueError(f"{path}: is a link, and only regular files are accepted; cp -RL copies "
                         "what links point to")  # fmt: skip
    if not path.exists():
        raise ValueError(f"{path}: is missing")
    if not path.is_file():
        raise ValueError(f"{path}: is not a regular file")


def file_hash(path: Path) -> str:
    """The file's SHA-256, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a .safetensors file, complete or not at all, with the usual permissions of a new file:
    safetensors itself makes files that only their owner may read."""
    from safetensors.torch import save_file

    with atomic_path(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata
        )
        partial.chmod(mode)


class NotRegular(ValueError):
    """A path is not a regular file: reading a pipe or a device might never end."""


def regular_size(path: Path) -> int:
    """The size in bytes of a file; links are followed. Raises `NotRegular` unless it is a regular
    file, OSError if it does not exist."""
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise NotRegular(f"{path} is not a regular file")
    return facts.st_size
