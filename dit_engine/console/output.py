"""Where a command writes. The name tells what is written; writing is tried before any work."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from dit_engine.console.run import closed
from dit_engine.io.files import atomic_path

OUTPUTS = {".png": "pil", ".npy": "np", ".safetensors": "latent"}
"""What `Engine.generate` must return for a file of each suffix. All other names are directories,
so that "run-v1.5" is one."""
STDOUT = Path("-")
"""Standard output, as the name of a file."""

_NO_DIRECTORY = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".npz", ".pt")
_NAME_LIMIT = 48  # at most 4 bytes each in UTF-8, which leaves room for the rest of 255


def destination(text: str) -> Path:
    """The path that a command is told to write to; "./-" is a file or directory named "-"."""
    path = Path(text)
    return path.absolute() if path == STDOUT and text != "-" else path


def output_kind(path: Path) -> str:
    """The ``output`` of `Engine.generate` that ``path`` asks for."""
    return OUTPUTS.get(path.suffix.lower(), "pil")


def is_directory(path: Path) -> bool:
    """Whether ``path`` asks for a directory of images."""
    return path != STDOUT and path.suffix.lower() not in OUTPUTS


def is_sheet(path: Path) -> bool:
    """Whether ``path`` asks for one picture of all images."""
    return path == STDOUT or path.suffix.lower() == ".png"


def check_destination(
    path: Path, overwrite: bool = False, suffixes: Collection[str] = tuple(OUTPUTS)
) -> None:
    """Raise a one-line ValueError or OSError if images or latents cannot be written to ``path``.

    overwrite: see `check_file`. suffixes: of the files that can be written.
    """
    if path == STDOUT:
        if 1 in closed:
            raise OSError("standard output is closed: nothing can be written to it")
        if sys.stdout.isatty():
            raise ValueError("-o - writes a PNG to standard output, which is a terminal here: "
                             "redirect it, or name a file")  # fmt: skip
        return
    suffix = path.suffix.lower()
    if suffix in suffixes:
        check_file(path, overwrite)
        return
    if suffix in (*OUTPUTS, *_NO_DIRECTORY) and not path.is_dir():
        allowed = ", ".join(suffixes)
        raise ValueError(f"{path}: {suffix} files are not written; use {allowed} or a directory")
    nearest = path.absolute()
    while not _exists(nearest):
        nearest = nearest.parent  # directories are made as needed
    _try_writing(nearest / "image.png", path)


def check_file(path: Path, overwrite: bool = False) -> None:
    """Raise a one-line OSError if no file can be written at ``path``; leave no trace.

    Warns that a file which is there will be replaced, unless ``overwrite`` says that it may be.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; a file name is needed")
    if not _exists(path.absolute().parent):
        raise FileNotFoundError(f"{path}: the directory {path.parent} does not exist")
    _try_writing(path, path)
    if path.is_file() and not overwrite:
        warnings.warn(f"{path} exists and will be replaced", stacklevel=2)


def write_stdout(data: bytes) -> None:
    """Write bytes unchanged to standard output, whatever the terminal's encoding."""
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"standard output cannot be written: {error.strerror}") from None


def file_name(index: int, label: int, name: str | None, seed: int | None) -> str:
    """The name of image ``index``'s PNG: "tench, Tinca tinca", seed 7 → "00000-tench-seed7.png".

    Letters, digits, "-", "_" and "." of the class name's first alias are kept, 48 at most.
    """
    first = (name or "").split(",")[0].strip()
    stem = re.sub(r"[^\w.-]+", "-", first)[:_NAME_LIMIT].strip("-.") or str(label)
    return f"{index:05d}-{stem}.png" if seed is None else f"{index:05d}-{stem}-seed{seed}.png"


def _exists(path: Path) -> bool:
    """Whether there is something, also a dangling link; it raises for a name that is too long."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


class _Tried(Exception):
    pass


def _try_writing(path: Path, asked: Path) -> None:
    """Begin to write ``path`` as it will be written later, and give up."""
    try:
        with suppress(_Tried), atomic_path(path) as partial:
            partial.touch()
            raise _Tried
    except OSError as error:
        raise OSError(f"{asked} cannot be written: {error.strerror}") from None
