"""Files that appear whole or not at all, and that no link of another user leads elsewhere."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_NAME_SHOWN = 48  # characters, at most 4 bytes each, which leaves room for the rest of 255
_PART_BYTES = 1 << 20
_NO_LINKS: int = getattr(os, "O_NOFOLLOW", 0)  # Windows has none of these
_DIRECTORY: int = getattr(os, "O_DIRECTORY", 0)
_NO_WAITING: int = getattr(os, "O_NONBLOCK", 0)  # until somebody opens a pipe's other end


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file that takes the name ``path`` once the block ends well.

    If the block raises, nothing is left of it, and ``path`` is as it was. A link that has the name
    is replaced, and what it leads to stays as it is. The temporary file lies in a
    `hidden_directory`, so that it may be opened by its name as often as is needed.

    Raises OSError if it cannot be written, or if ``path`` is a device or a pipe, which would be
    gone afterwards.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "A device or a pipe is not replaced by a file", str(path))
    with hidden_directory(path) as (_, held):
        partial = held / f".{path.name}.partial"  # which nobody takes for a finished picture
        try:
            yield partial
            partial.replace(path)
        except OSError as error:
            if error.filename != str(partial):
                raise
            raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def hidden_directory(target: Path) -> Iterator[tuple[Path, Path]]:
    """An empty directory beside ``target`` that is the user's alone; it goes when the block ends.

    Its name, ``.NAME.TOKEN.partial``, cannot be guessed, so that nobody can lay a link there
    beforehand, and nobody else may write into it (mode 0700). What a killed process leaves behind
    has such a name, and can be removed.

    Yields two paths: by its name, and one that leads to it whatever becomes of its name.
    """
    name = f".{target.name[:_NAME_SHOWN]}.{secrets.token_hex(8)}.partial"
    folder = target.with_name(name)
    try:
        # On Windows, what is made inside would inherit that nobody else may read it.
        folder.mkdir(0o700 if os.name == "posix" else 0o777)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from None
    made = folder.lstat()
    with _held(folder) as held:
        try:
            yield folder, held
        finally:
            with suppress(OSError):  # it may have another name by now
                for entry in held.iterdir() if os.path.samestat(made, held.stat()) else ():
                    if entry.is_dir() and not entry.is_symlink():
                        shutil.rmtree(entry, ignore_errors=True)
                    else:
                        entry.unlink()
                folder.rmdir()


@contextmanager
def _held(folder: Path) -> Iterator[Path]:
    """A path that leads to a new ``folder``, whatever becomes of its name.

    Where a directory is writable for others and has no sticky bit, they may rename what is in it,
    and put a directory with links in the place. Linux has names for open directories.
    """
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
    """Who owns what is made in an open directory; on some file systems, that is not this user."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINKS
    probe = os.open("probe", flags, dir_fd=directory)
    try:
        return os.fstat(probe).st_uid
    finally:
        os.close(probe)
        os.unlink("probe", dir_fd=directory)


def no_links(path: str, flags: int) -> int:
    """For ``open(path, …, opener=no_links)``: OSError where the file is a symbolic link."""
    if Path(path).is_symlink():  # in words; the flag below is for those who are quicker
        raise OSError(errno.ELOOP, "A link, and nothing is written through one", path)
    return os.open(path, flags | _NO_LINKS, 0o666)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process (or thread) at a time for a directory, or for a file, which is made where it is
    missing and must not be a link; the others wait.

    No lock where the system has no flock.
    """
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
        os.close(descriptor)  # and with it goes the lock


def check_regular(path: Path) -> None:
    """Raises a one-line ValueError unless ``path`` is a regular file: where others may have put
    links, these could lead to any file of this user."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: is missing") from None
    if stat.S_ISLNK(mode):
        raise ValueError(f"{path}: is a link, and only regular files are taken; cp -RL copies what "
                         "links lead to")  # fmt: skip
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: is no regular file")


def file_hash(path: Path) -> str:
    """The file's SHA-256, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_PART_BYTES):
            digest.update(part)
    return digest.hexdigest()


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a .safetensors file, whole or not at all, with the permissions that any other new file
    would have: safetensors itself makes its files readable by their owner alone."""
    from safetensors.torch import save_file

    with atomic_path(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, partial, metadata)
        partial.chmod(mode)


class NotRegular(ValueError):
    """Raised for a directory, and for pipes and devices: reading might wait or go on for ever."""


def regular_size(path: Path) -> int:
    """Bytes of a file, or of the one that a link leads to.

    Raises `NotRegular` for what is no regular file, OSError where there is nothing.
    """
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise NotRegular(f"{path} is no regular file")
    return facts.st_size
