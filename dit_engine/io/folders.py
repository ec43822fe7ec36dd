"""Find the pictures in a folder, and count what else is there."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
"""What torchvision's ImageFolder and pytorch-fid take for pictures."""

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
        for path, kind in _entries(waiting.pop()):
            if kind == "folder" and (target := path.resolve()) not in entered:
                entered.add(target)
                waiting.append(path)
            elif kind == "picture":
                found.append(path)
            else:
                left_out[_LINK_BACK if kind == "folder" else kind] += 1
    return sorted(found)


def find_folders(folder: Path, left_out: Counter[str]) -> list[Path]:
    """The folders in ``folder``, and links to folders, except those that `find_images` would not
    enter; what else is there is counted in ``left_out``, by kind."""
    around = _around(folder)
    names = {"folder": _LINK_BACK, "picture": "beside the folders"}
    found = []
    for path, kind in _entries(folder):
        if kind == "folder" and path.resolve() not in around:
            found.append(path)
        else:
            left_out[names.get(kind, kind)] += 1
    return found


def count_of(left_out: Counter[str]) -> str:
    """For messages: "12 .gif, 1 hidden"; at most six kinds are named."""
    many = left_out.most_common(6)
    rest = left_out.total() - sum(n for _, n in many)
    return ", ".join(f"{n} {kind}" for kind, n in [*many, ("of other kinds", rest)] if n)


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


def _entries(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if path.name.startswith(".") or path.name == "__MACOSX":
            yield path, "hidden"
        elif path.is_dir():
            yield path, "folder"
        elif not path.exists():
            yield path, "link to nothing"
        elif not path.is_file():  # reading a pipe would wait for ever
            yield path, "no regular file"
        else:
            yield path, "picture" if suffix in SUFFIXES else suffix or "without a suffix"
