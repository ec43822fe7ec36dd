"""Sets of images to compare, from a folder, an .npz or a model, read in batches.

An .npz is in ADM's format: ``arr_0``, uint8 (N, H, W, 3), and in reference files the moments of
Inception features, ``mu``, ``sigma`` (pooled) and ``mu_s``, ``sigma_s`` (spatial). No more than one
batch of images is held in memory.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dit_bench.quality.metrics import Statistics
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
_ARRAY, _STATISTICS = "arr_0", ("mu", "sigma", "mu_s", "sigma_s")
_NAME_SHOWN = 80  # characters of an array's name in a message
_WIDEST = 2048  # features of Inception; other networks have fewer
_BATCH_PIXELS = 2**25  # 32 images of 1024×1024, which networks convert to float32
_SINGLE_LIMIT = 1e-5  # size of a negative eigenvalue from float32 rounding, over the largest one


@dataclass(frozen=True)
class ComparedSet:
    """One side of a comparison: images, or moments of Inception features, or both.

    count, size: of the images, which have one size (height, width); 0 and None if there are none.
    batches: yields them as uint8 (n, H, W, 3) in an order that never changes; n is its argument,
        but smaller for large images and in the last batch. ValueError for a bad image.
    statistics: those of the pooled and of the spatial features; None if the file has none.
    record: of generated images, the engine's settings, once there is an image.
    """

    name: str
    count: int = 0
    size: tuple[int, int] | None = None
    batches: Callable[[int], Iterator[Images]] = lambda _: iter(())
    statistics: tuple[Statistics, Statistics] | None = None
    record: dict[str, Any] = field(default_factory=dict)


def open_set(path: Path) -> ComparedSet:
    """The set in a folder of images or an .npz.

    Raises ValueError for anything else, for no images, images of several sizes, or an .npz with
    other arrays; it names the file and what is wrong. OSError if the path cannot be read.
    """
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; a folder of images or an .npz is needed")
    if path.suffix.lower() != ".npz":
        raise ValueError(f"{path} is neither a folder of images nor an .npz")
    with open_npz(path) as archive:
        names = [name.removesuffix(".npy")[:_NAME_SHOWN] for name in archive.namelist()]
    known = [name for name in (_ARRAY, *_STATISTICS) if name in names]
    if known not in ([_ARRAY], [*_STATISTICS], [_ARRAY, *_STATISTICS]):
        raise ValueError(
            f"{path} holds {some_of(names, quote=False) or 'nothing'}; {_ARRAY} (images), or all "
            f"of {', '.join(_STATISTICS)} (statistics), or both are needed"
        )
    found = _array(path) if _ARRAY in known else ComparedSet(str(path))
    if "mu" not in known:
        return found
    both = (_statistics(path, "mu", "sigma"), _statistics(path, "mu_s", "sigma_s"))
    return replace(found, statistics=both)


def _folder(folder: Path) -> ComparedSet:
    """The images in a folder and the folders below it, in the order of their paths.

    All headers are read first, so that a wrong size is reported before any long work. Pixels are
    those that the published tools read: EXIF orientation is not applied and alpha is dropped; a
    warning says so if it matters.
    """
    from dit_engine.console.bars import Bar

    left_out: Counter[str] = Counter()
    paths = find_images(folder, left_out)
    if not paths:
        raise ValueError(
            f"{folder} holds no images ({', '.join(SUFFIXES)})"
            + (f", but {count_of(left_out)}" if left_out else "")
        )
    sizes: dict[tuple[int, int], Path] = {}
    ignored: Counter[str] = Counter()
    with Bar(paths, f"{folder.name}: sizes", unit="img", delay=2.0) as bar:
        for path in bar:
            with open_image(path) as image:
                if image.mode not in _MODES:
                    raise Unreadable(f"mode {image.mode}; 8-bit {', '.join(_MODES)} are known")
                ignored["with an EXIF orientation"] += has_orientation(image)
                ignored["with an alpha channel"] += image.has_transparency_data
                sizes.setdefault((image.height, image.width), path)
            if len(sizes) > 1:
                told = (f"{each} is {w}×{h} pixels" for (h, w), each in sizes.items())
                raise ValueError(f"{' and '.join(told)}; all images of a set must have one size")
    tell_left_out(folder, left_out)
    if ignored.total():
        told = f"{folder}: {count_of(+ignored)}, which is ignored, as by the published tools"
        warnings.warn(told, stacklevel=3)

    (size,) = sizes

    def decode(path: Path) -> Images:
        with open_image(path) as image:
            return np.asarray(image.convert("RGB"))

    def batches(batch_size: int) -> Iterator[Images]:
        most = _at_once(batch_size, size)
        for start in range(0, len(paths), most):
            yield np.stack([decode(path) for path in paths[start : start + most]])

    return ComparedSet(str(folder), len(paths), size, batches)


def _array(path: Path) -> ComparedSet:
    """``arr_0`` of an .npz, streamed from the file, compressed or not."""
    with _open_images(path) as stored:
        count, height, width, _ = stored.shape

    def batches(batch_size: int) -> Iterator[Images]:
        most = _at_once(batch_size, (height, width))
        with _open_images(path) as stored:
            for start in range(0, count, most):
                yield stored.rows(min(most, count - start))

    return ComparedSet(str(path), count, (height, width), batches)


@contextmanager
def _open_images(path: Path) -> Iterator[StoredArray]:
    with open_member(path, _ARRAY) as stored:
        shape, fits = stored.shape, stored.dtype == np.uint8 and not stored.fortran
        if not fits or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            order = " in Fortran order" if stored.fortran else ""
            raise ValueError(f"{stored}{order}; uint8 (N, H, W, 3) in C order is needed")
        try:
            check_pixels(shape[2], shape[1], regular_size(path))
        except Unreadable as error:
            raise ValueError(f"{stored.source} is of {error}") from None
        yield stored


def _at_once(batch_size: int, size: tuple[int, int]) -> int:
    return max(min(batch_size, _BATCH_PIXELS // math.prod(size)), 1)


def _statistics(path: Path, *names: str) -> Statistics:
    """The mean (D,) and covariance (D, D) in the arrays with these names."""
    arrays: list[NDArray[Any]] = []
    for name in names:
        with open_member(path, name) as stored:
            fits = stored.dtype.kind == "f" and len(stored.shape) == len(arrays) + 1
            sizes = {*stored.shape, *(len(array) for array in arrays)}
            if not fits or len(sizes) != 1 or not 1 <= max(sizes) <= _WIDEST:
                raise ValueError(
                    f"{stored}; floating numbers {'(D, D)' if arrays else '(D,)'} are needed, "
                    f"where D is one number from 1 to {_WIDEST}"
                )
            arrays.append(stored.read())
            if not np.isfinite(arrays[-1]).all():
                raise ValueError(f"{stored} and holds a NaN or an infinity; finite are needed")
    mean, covariance = (array.astype(np.float64) for array in arrays)
    if np.abs(covariance - covariance.T).max() > 1e-6 * np.abs(covariance).max():
        raise ValueError(f"{path}: {names[1]} is not symmetric")
    covariance = (covariance + covariance.T) / 2
    if arrays[1].dtype.itemsize < 8:  # rounding can have left eigenvalues slightly below 0
        values, vectors = np.linalg.eigh(covariance)
        if _SINGLE_LIMIT * values[-1] > -values[0] > 0:
            covariance = (vectors * values.clip(min=0.0)) @ vectors.T
    return Statistics(mean, covariance)


def generated(
    engine: Engine, name: str, labels: Sequence[int], first_seed: int, **settings: Any
) -> ComparedSet:
    """Images that an engine makes while they are read: image i has labels[i] and first_seed + i.

    Raises ValueError if the engine makes no images.
    """
    if engine.image_size is None:
        raise ValueError(f"model {name!r} has no VAE; distances are of images")
    record: dict[str, Any] = {}

    def batches(batch_size: int) -> Iterator[Images]:
        for start in range(0, len(labels), batch_size):
            part = [int(label) for label in labels[start : start + batch_size]]
            seeds = [first_seed + start + i for i in range(len(part))]
            made = engine.generate(part, seeds=seeds, output="np", **settings)
            record.update(made.settings)
            yield np.asarray(made.images)

    size = (engine.image_size, engine.image_size)
    return ComparedSet(name, len(labels), size, batches, record=record)


def try_step(engine: Engine, count: int, **settings: Any) -> None:
    """Take one denoising step of ``count`` images, or raise what `Engine.generate` raises.

    This shows, before any long work, whether the model runs with these settings. The count should
    be that of the real batches, because a backend may compile or allocate for that count.
    """

    class Ran(Exception):
        pass

    def stop(_: object) -> None:
        raise Ran

    with suppress(Ran):
        engine.generate([0] * count, callback=stop, output="latent", **settings)
