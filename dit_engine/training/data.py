"""Labelled images in memory or in a mapped file, and folders of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dit_engine.io.folders import SUFFIXES, count_of, find_folders, find_images, tell_left_out
from dit_engine.io.images import read_rgb
from dit_engine.labels import class_order, same_name


@dataclass(frozen=True)
class ImageSet:
    """N images with their classes.

    images: uint8 (N, S, S, 3); labels: int64 (N,); class_names: one per class.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> int:
        return self.images.shape[1]

    def tensor(self, indices: np.ndarray) -> Tensor:
        """The chosen images as float32 (n, 3, S, S) in [-1, 1], in channels-last memory."""
        pixels = torch.from_numpy(np.ascontiguousarray(self.images[indices]))
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def load_image_folder(root: Path, size: int, earlier: Sequence[str] = ()) -> ImageSet:
    """Read a folder with one directory per class. Each image is cropped to its centre square and
    resized to ``size`` pixels.

    Classes are numbered by `class_order`, or in the order of ``earlier`` if it has the same names.
    `find_images` decides which files are images; a warning counts the others.

    Raises ValueError for a folder without classes, a class without images, a file that is no image,
    and two directories whose names are the same to `resolve_labels`.
    """
    from PIL import Image, ImageOps

    if not root.is_dir():
        raise ValueError(f"image folder {root} is not a directory")
    left_out: Counter[str] = Counter()
    names = class_order(path.name for path in find_folders(root, left_out))
    if not names:
        raise ValueError(f"image folder {root} holds no directories; one a class is needed")
    if same := same_name(names):
        paths = " and ".join(ascii(str(root / name)) for name in same)
        raise ValueError(f"{paths} are two classes of one name: rename one or join them")
    names = list(earlier) if set(names) == set(earlier) else names
    images, labels = [], []
    for label, name in enumerate(names):
        others: Counter[str] = Counter()
        paths = find_images(root / name, others)
        if not paths:
            but = f", but {count_of(others)}" if others else ""
            raise ValueError(f"class {name!r} holds no images ({', '.join(SUFFIXES)}){but}")
        left_out += others
        fitted = (ImageOps.fit(read_rgb(p), (size, size), Image.Resampling.BOX) for p in paths)
        images += map(np.asarray, fitted)
        labels += [label] * len(paths)
    tell_left_out(root, left_out)
    return ImageSet(np.stack(images), np.asarray(labels), tuple(names))
