"""Labelled images in memory (or memory-mapped), and folders of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dit_engine.labels import class_order

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class ImageSet:
    """N images with their classes.

    images: uint8 (N, S, S, 3); labels: int64 (N,); class_names: one name a class.
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
        """The chosen images as float32 (n, 3, S, S) in [-1, 1]."""
        pixels = torch.from_numpy(np.ascontiguousarray(self.images[indices]))
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def load_image_folder(root: Path, size: int, earlier: Sequence[str] = ()) -> ImageSet:
    """Read one directory a class, each image cropped to its centre square and resized.

    Classes are numbered by `class_order`, or, if they are those of an ``earlier`` reading, as then.

    Raises ValueError for a folder without classes, an empty class, or a file that is no image.
    """
    from PIL import Image, ImageOps

    if not root.is_dir():
        raise ValueError(f"image folder {root} is not a directory")
    classes = [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
    if not classes:
        raise ValueError(f"image folder {root} holds no directories; one a class is needed")
    names = class_order(path.name for path in classes)
    if set(names) == set(earlier):
        names = list(earlier)
    images, labels = [], []
    for label, directory in enumerate(root / name for name in names):
        paths = sorted(p for p in directory.rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not paths:
            raise ValueError(f"class {directory.name!r} holds no images ({sorted(_SUFFIXES)})")
        for path in paths:
            try:
                with Image.open(path) as image:
                    fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BOX)
            except OSError as error:
                raise ValueError(f"{path} cannot be read as an image: {error}") from error
            images.append(np.asarray(fitted))
            labels.append(label)
    return ImageSet(np.stack(images), np.asarray(labels), tuple(names))
