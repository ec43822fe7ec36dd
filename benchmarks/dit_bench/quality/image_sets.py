"""Sets of images to compare, from a folder, an .npz or a model, read in batches.

An .npz is in ADM's format: ``arr_0``, uint8 (N, H, W, 3), and in reference files the moments of
Inception features, ``mu``, ``sigma`` (pooled) and ``mu_s``, ``sigma_s`` (spatial). No more than one
batch of images is held in memory.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dit_bench.quality.frechet import Statistics
from dit_engine.io.arrays import StoredArray, open_member, open_npz
from dit_engine.io.files import regular_size
from dit_engine.io.folders import SUFFIXES, count_of, find_images, tell_left_out
from dit_engine.io.images import Unreadable, check_pixels, has_orientation, open_image
from dit_engine.io.printable import some_of

if TYPE_CHECKING:
    from dit_engine.engine import Engine

Images = NDArray[np.uint8]
# Pillow converts these to 8-bit RGB without losing range; the values of 16-bit modes would be cut.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_ARRAY = "arr_0"
_NAME_SHOWN = 80  # characters of an array's name in a message
_WIDEST = 2048  # features of Inception; other networks have fewer
_BATCH_PIXELS = 2**25  # 32 images of 1024×1024, which networks convert to float32
_STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


class ImageSource(Protocol):
    """Images of one size, in an order that never changes."""

    name: str

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        ...

    def __len__(self) -> int: ...

    def batches(self, batch_size: int) -> Iterator[Images]:
        """uint8 (n, H, W, 3). n is batch_size, but smaller for large images and in the last batch.
        ValueError for a bad image."""
        ...


@dataclass(frozen=True)
class ComparedSet:
    """One side of a comparison: images, or moments of Inception features, or both.

    statistics: those of the pooled and of the spatial features; None if the file has none.
    """

    name: str
    images: ImageSource | None
    statistics: tuple[Statistics, Statistics] | None = None


def open_set(path: Path) -> ComparedSet:
    """The set in a folder of images or an .npz.

    Raises ValueError for anything else, for no images, images of several sizes, or an .npz with
    other arrays; it names the file and what is wrong. OSError if the path cannot be read.
    """
    if path.is_dir():
        return ComparedSet(str(path), ImageFolder(path))
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; a folder of images or an .npz is needed")
    if path.suffix.lower() != ".npz":
        raise ValueError(f"{path} is neither a folder of images nor an .npz")
    with open_npz(path) as archive:
        names = [name.removesuffix(".npy")[:_NAME_SHOWN] for name in archive.namelist()]
    held = some_of(names, quote=False) or "nothing"
    absent = [name for name in _STATISTICS if name not in names]
    if 0 < len(absent) < len(_STATISTICS):
        raise ValueError(f"{path} holds {held}; a statistics file also has {', '.join(absent)}")
    if absent and _ARRAY not in names:
        raise ValueError(
            f"{path} holds {held}; {_ARRAY} (images) or {', '.join(_STATISTICS)} (statistics) "
            "are needed"
        )
    images = ImageArray(path) if _ARRAY in names else None
    if absent:
        return ComparedSet(str(path), images)
    return ComparedSet(str(path), images, (_stored(path, *_STATISTICS[:2]),
                                           _stored(path, *_STATISTICS[2:])))  # fmt: skip


class ImageFolder:
    """The images in a folder and the folders below it (`find_images`), in the order of their paths.

    All headers are read first, so that a wrong size is reported before any long work. Pixels are
    those that the published tools read: EXIF orientation is not applied and alpha is dropped; a
    warning says so if it matters.
    """

    def __init__(self, folder: Path) -> None:
        from dit_engine.console.bars import Bar

        self.name = str(folder)
        left_out: Counter[str] = Counter()
        self.paths = find_images(folder, left_out)
        if not self.paths:
            raise ValueError(
                f"{folder} holds no images ({', '.join(SUFFIXES)})"
                + (f", but {count_of(left_out)}" if left_out else "")
            )
        ignored: Counter[str] = Counter()
        self.size = _header(self.paths[0], ignored)
        with Bar(self.paths[1:], f"{folder.name}: sizes", unit="img", delay=2.0) as bar:
            for path in bar:
                if (size := _header(path, ignored)) != self.size:
                    raise ValueError(
                        f"{path} is {_pixels(size)} and {self.paths[0].name} is "
                        f"{_pixels(self.size)}; all images of a set must have one size"
                    )
        tell_left_out(folder, left_out)
        if ignored.total():
            warnings.warn(
                f"{folder}: {count_of(+ignored)}, which is ignored, as by the published tools",
                stacklevel=3,
            )

    def __len__(self) -> int:
        return len(self.paths)

    def batches(self, batch_size: int) -> Iterator[Images]:
        most = _at_once(batch_size, self.size)
        for start in range(0, len(self.paths), most):
            yield np.stack([_decode(path) for path in self.paths[start : start + most]])


class ImageArray:
    """``arr_0`` of an .npz, uint8 (N, H, W, 3), streamed from the file, compressed or not."""

    def __init__(self, path: Path) -> None:
        self.name, self.path = str(path), path
        with self._open() as stored:
            self._count, height, width, _ = stored.shape
            self.size = (height, width)

    def __len__(self) -> int:
        return self._count

    def batches(self, batch_size: int) -> Iterator[Images]:
        count, most = len(self), _at_once(batch_size, self.size)
        with self._open() as stored:
            for start in range(0, count, most):
                yield stored.rows(min(most, count - start))

    @contextmanager
    def _open(self) -> Iterator[StoredArray]:
        with open_member(self.path, _ARRAY) as stored:
            shape = stored.shape
            if stored.dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
                raise ValueError(f"{stored}; uint8 (N, H, W, 3) is needed")
            if stored.fortran:
                raise ValueError(f"{stored.source} is in Fortran order; C order is needed")
            try:
                check_pixels(shape[2], shape[1], regular_size(self.path))
            except Unreadable as error:
                raise ValueError(f"{stored.source} is of {error}") from None
            yield stored


class GeneratedImages:
    """Images that an engine makes as they are read: image i has labels[i] and first_seed + i.

    record: the settings that the engine records, once it has made an image.

    Raises ValueError if the engine makes no images.
    """

    def __init__(
        self, engine: Engine, name: str, labels: Sequence[int], first_seed: int, **settings: Any
    ) -> None:
        if engine.image_size is None:
            raise ValueError(f"model {name!r} has no VAE; distances are of images")
        self.name, self.size = name, (engine.image_size, engine.image_size)
        self.record: dict[str, Any] = {}
        self._engine, self._labels, self._settings = engine, labels, settings
        self._first_seed = first_seed

    def __len__(self) -> int:
        return len(self._labels)

    def batches(self, batch_size: int) -> Iterator[Images]:
        for start in range(0, len(self), batch_size):
            labels = [int(label) for label in self._labels[start : start + batch_size]]
            seeds = [self._first_seed + start + i for i in range(len(labels))]
            made = self._engine.generate(labels, seeds=seeds, output="np", **self._settings)
            self.record = made.settings
            yield np.asarray(made.images)


class _Ran(Exception):
    """A step was taken."""


def try_step(engine: Engine, count: int, **settings: Any) -> None:
    """Take one denoising step of ``count`` images, or raise what `Engine.generate` raises.

    This finds out before any long work whether the model runs with these settings. The count should
    be that of the real batches, for which a backend may compile or allocate.
    """

    def stop(_: object) -> None:
        raise _Ran

    with suppress(_Ran):
        engine.generate([0] * count, callback=stop, output="latent", **settings)


def _stored(path: Path, *names: str) -> Statistics:
    arrays = []
    for name in names:
        with open_member(path, name) as stored:
            sizes_fit = all(1 <= n <= _WIDEST for n in stored.shape)
            if stored.dtype.kind != "f" or len(stored.shape) not in (1, 2) or not sizes_fit:
                raise ValueError(
                    f"{stored}; floating numbers of 1 to {_WIDEST} features are needed"
                )
            arrays.append(stored.read())
    try:
        return Statistics(*arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {', '.join(names)}: {error}") from None


def _at_once(batch_size: int, size: tuple[int, int]) -> int:
    """Images in one batch: ``batch_size``, or fewer if the images are large."""
    return max(min(batch_size, _BATCH_PIXELS // math.prod(size)), 1)


def _header(path: Path, ignored: Counter[str]) -> tuple[int, int]:
    """Height and width from the file's header. Counts in ``ignored`` what `_decode` ignores."""
    with open_image(path) as image:
        if image.mode not in _MODES:
            raise Unreadable(f"mode {image.mode}; 8-bit {', '.join(_MODES)} are known")
        ignored["with an EXIF orientation"] += has_orientation(image)
        ignored["with an alpha channel"] += image.has_transparency_data
        return image.height, image.width


def _decode(path: Path) -> Images:
    """uint8 (H, W, 3)."""
    with open_image(path) as image:
        return np.asarray(image.convert("RGB"))


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[1]}×{size[0]} pixels"
