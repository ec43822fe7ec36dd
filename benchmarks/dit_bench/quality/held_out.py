"""The held-out images that generated ones are compared with, and their features."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_bench.quality.lite0 import FEATURES, WEIGHTS_SHA256, Lite0, extract
from dit_engine.io.arrays import open_member
from dit_engine.io.files import atomic_path
from dit_engine.training.data import ImageSet

Features = NDArray[np.float32]  # (N, 1280)


@dataclass(frozen=True)
class Halves:
    """Held-out images of every class, split in two; B is what everything is compared with.

    images_a: uint8 (n, S, S, 3); features_*: (n, 1280); labels: (n,), of A and of B alike.
    """

    images_a: NDArray[np.uint8]
    features_a: Features
    features_b: Features
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]


def load_halves(data: Path, per_class: int, size: int, network: Lite0) -> Halves:
    """The first ``per_class`` held-out avatars of each class (A) and the next as many (B).

    Rendered images and their features are kept in ``data``.
    """
    from dit_engine.training.avatars import load_avatars

    held_out = load_avatars(data, "held-out", 2 * per_class, size)
    cache = data / f"avatars-held-out-{size}px-{2 * per_class}.fd-lite0.npz"
    return split(held_out, cached_features(held_out, cache, network))


def split(held_out: ImageSet, features: Features) -> Halves:
    """The halves of a set and of its features (N, 1280).

    Raises ValueError where a class has an odd number of images.
    """
    in_a = first_half(held_out.labels)
    if not np.array_equal(held_out.labels[in_a], held_out.labels[~in_a]):
        raise ValueError("labels of the halves differ; order the images by class")
    return Halves(
        images_a=held_out.images[in_a],
        features_a=features[in_a],
        features_b=features[~in_a],
        labels=held_out.labels[in_a],
        class_names=held_out.class_names,
    )


def first_half(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(N,) True for the first half of each class, in order of appearance.

    Raises ValueError where a class has an odd number of images.
    """
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        (indices,) = np.nonzero(labels == label)
        if len(indices) % 2:
            raise ValueError(f"class {label} has {len(indices)} images; an even number is needed")
        chosen[indices[: len(indices) // 2]] = True
    return chosen


def cached_features(held_out: ImageSet, cache: Path, network: Lite0) -> Features:
    """Features of all images, read from ``cache`` if it was made from these pixels and weights.

    The file's name alone would not tell that the images were rendered anew.
    """
    key = hashlib.sha256(held_out.images.tobytes()).hexdigest() + WEIGHTS_SHA256
    if cache.exists() and _read(cache, "key", np.array(key)) == key:
        return _read(cache, "features", np.empty((len(held_out), FEATURES), np.float32))
    features = extract(held_out.images, network, description="features of held-out images")
    with atomic_path(cache) as partial, partial.open("wb") as file:
        np.savez(file, features=features, key=np.array(key))
    return features


def _read(cache: Path, name: str, like: NDArray[Any]) -> NDArray[Any]:
    with open_member(cache, name) as stored:
        if (stored.shape, stored.dtype) != (like.shape, like.dtype):
            raise ValueError(f"{stored}; {like.dtype} {like.shape} is needed: remove the file")
        return stored.read()
