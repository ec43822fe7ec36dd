"""Find the pictures in a folder, and count what else is there."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
"""What torchvision's ImageFolder and pytorch-fid take for pictures."""

_KINDS_TOLD = 6  # of what is left out
# What an entry of a folder is, beside the kinds that are left out.
_PICTURE, _FOLDER = "picture", "folder"
_LINK_BACK = "link to a folder that is read anyway"


def find_images(folder: Path, left_out: Counter[str]) -> list[Path]:
    """The pictures in ``folder`` and below, in the order of their paths; what else is there is
    counted in ``left_out``, by kind.

    Hidden files and folders are left out. Links to folders are followed, but no folder is entered
    twice, nor one that holds ``folder``.
    """
    entered = _around(folder)
    found, waiting = [], [folder]
    while waiting:
        for path in sorted(waiting.pop().iterdir()):
            kind = _kind(path)
            if kind == _FOLDER and (target := path.resolve()) not in entered:
                entered.add(target)
                waiting.append(path)
            elif kind == _PICTURE:
                found.append(path)
            else:
                left_out[_LINK_BACK if kind == _FOLDER else kind] += 1
    return sorted(found)


def find_folders(folder: Path, left_out: Counter[str]) -> list[Path]:
    """The folders in ``folder``, links to folders among them, but for those that `find_images`
    would not enter; what else is there is counted in ``left_out``, by kind."""
    around = _around(folder)
    found = []
    for path in sorted(folder.iterdir()):
        kind = _kind(path)
        if kind == _FOLDER and path.resolve() not in around:
            found.append(path)
        else:
            left_out[{_FOLDER: _LINK_BACK, _PICTURE: "beside the folders"}.get(kind, kind)] += 1
    return found


def count_of(left_out: Counter[str]) -> str:
    """For messages: "12 .gif, 1 hidden"."""
    many = left_out.most_common(_KINDS_TOLD)
    parts = [f"{n} {kind}" for kind, n in many]
    if rest := left_out.total() - sum(n for _, n in many):
        parts.append(f"{rest} of other kinds")
    return ", ".join(parts)


def tell_left_out(folder: Path, left_out: Counter[str]) -> None:
    """One warning with the counts, if there are any."""
    if left_out:
        warnings.warn(
            f"{folder}: {left_out.total()} left out ({count_of(left_out)}); "
            f"images are {', '.join(SUFFIXES)}",
            stacklevel=3,
        )


def _around(folder: Path) -> set[Path]:
    """The folder and all that hold it, by its own path and by the one that links lead to."""
    real, parent = folder.resolve(), folder.absolute().parent.resolve()
    return {real, *real.parents, parent, *parent.parents}


def is_hidden(name: str) -> bool:
    """Whether systems or programs keep a file or folder of this name for themselves."""
    return name.startswith(".") or name == "__MACOSX"


def _kind(path: Path) -> str:
    """`_PICTURE`, `_FOLDER`, or what it is that is left out."""
    if is_hidden(path.name):
        return "hidden"
    if path.is_dir():
        return _FOLDER
    if not path.exists():
        return "link to nothing"
    if not path.is_file():  # reading a pipe would wait for ever
        return "no regular file"
    suffix = path.suffix.lower()
    return _PICTURE if suffix in SUFFIXES else suffix or "without a suffix"
