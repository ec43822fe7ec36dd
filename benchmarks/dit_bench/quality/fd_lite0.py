"""``dit-bench quality``: how good a model's images are, by FD-Lite0 and by class recognition.

The held-out avatars of each class are split into two halves, A and B. Three sets are measured by
their FD-Lite0 distance to B:

- floor: A itself. Real images against real ones show what a limited N costs.
- vae_reconstruction: A after the VAE's encoder and decoder. No DiT could do better.
- generated: the model's images, as many of each class as B has.

An image is recognised if its features lie nearest to the mean of its own class in A. The distance
is Euclidean, and each feature is divided by its standard deviation within classes. The fraction of
B that is recognised is the most that can be expected of the generated images.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from dit_bench.machine import describe
from dit_bench.quality.features import FeatureNetwork, Images, SetFeatures, load_network
from dit_bench.quality.frechet import frechet_distance, moments_of
from dit_bench.quality.image_sets import ComparedSet, GeneratedImages
from dit_bench.quality.lite0 import FEATURES, WEIGHTS_SHA256
from dit_bench.report import Row, new_report, write
from dit_bench.show.reports import report_tables
from dit_bench.show.tables import show
from dit_engine.console.output import check_file
from dit_engine.console.parser import add_model_argument, add_sampling_arguments, sampling_options
from dit_engine.io.arrays import open_member
from dit_engine.io.files import atomic_path
from dit_engine.training.data import ImageSet

if TYPE_CHECKING:
    from dit_engine.vae import AutoencoderKL

METRIC = "FD-Lite0"
_BATCH = 64  # images between two updates of the progress bar

Features = NDArray[np.float32]  # (N, 1280)


@dataclass(frozen=True)
class Halves:
    """Held-out images of every class, split in two; everything is compared with B.

    images_a: uint8 (n, S, S, 3); features_*: (n, 1280); labels: (n,), the same for A and B.
    """

    images_a: Images
    features_a: Features
    features_b: Features
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]


def load_halves(data: Path, per_class: int, size: int, network: FeatureNetwork) -> Halves:
    """The first ``per_class`` held-out avatars of each class (A) and the next ``per_class`` (B).

    Rendered images and their features are kept in ``data``.
    """
    from dit_engine.training.avatars import load_avatars

    held_out = load_avatars(data, "held-out", 2 * per_class, size)
    cache = data / f"avatars-held-out-{size}px-{2 * per_class}.fd-lite0.npz"
    return split(held_out, cached_features(held_out, cache, network))


def split(held_out: ImageSet, features: Features) -> Halves:
    """The halves of a set and of its features (N, 1280): of each class, the first images are A.

    Raises ValueError if a class has an odd number of images.
    """
    labels, in_a = held_out.labels, np.zeros(len(held_out), bool)
    for label in np.unique(labels):
        (indices,) = np.nonzero(labels == label)
        if len(indices) % 2:
            raise ValueError(f"class {label} has {len(indices)} images; an even number is needed")
        in_a[indices[: len(indices) // 2]] = True
    if not np.array_equal(labels[in_a], labels[~in_a]):
        raise ValueError("labels of the halves differ; order the images by class")
    return Halves(
        held_out.images[in_a], features[in_a], features[~in_a], labels[in_a], held_out.class_names
    )


def cached_features(held_out: ImageSet, cache: Path, network: FeatureNetwork) -> Features:
    """Features of all images, read from ``cache`` if it was made from these pixels and weights.

    The file's name alone would not show that the images were rendered again.
    """
    key = hashlib.sha256(held_out.images.tobytes()).hexdigest() + WEIGHTS_SHA256
    if cache.exists() and _read(cache, "key", np.array(key)) == key:
        return _read(cache, "features", np.empty((len(held_out), FEATURES), np.float32))
    features = network.pooled(held_out.images, "features of held-out images")
    with atomic_path(cache) as partial, partial.open("wb") as file:
        np.savez(file, features=features, key=np.array(key))
    return features


def _read(cache: Path, name: str, like: NDArray[Any]) -> NDArray[Any]:
    with open_member(cache, name) as stored:
        if (stored.shape, stored.dtype) != (like.shape, like.dtype):
            raise ValueError(f"{stored}; {like.dtype} {like.shape} is needed: remove the file")
        return stored.read()


def recognised(
    features: Features, labels: NDArray[np.int64], known: Features, known_labels: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """(n,) whether each image lies nearest to the mean feature of its own class.

    Args:
        features, labels: (n, D) and (n,), the images to be recognised.
        known, known_labels: (m, D) and (m,), the images that give the means and the scale.

    Raises ValueError for a label that no known image has.
    """
    classes = np.unique(known_labels)
    unknown = np.setdiff1d(labels, classes)
    if len(unknown):
        raise ValueError(f"label {unknown[0]} has no known image; known are {classes.tolist()}")
    means = np.stack([known[known_labels == c].mean(axis=0, dtype=np.float64) for c in classes])
    within = known - means[np.searchsorted(classes, known_labels)]
    spread = within.std(axis=0)
    spread[spread == 0] = np.inf  # a constant feature says nothing about the class
    a, b = features / spread, means / spread
    squared = (a * a).sum(1)[:, None] - 2 * a @ b.T + (b * b).sum(1)[None]  # (n, classes)
    return classes[squared.argmin(axis=1)] == labels


def compare(
    halves: Halves, reconstructions: Features, generated: Features, *, allow_few: bool = False
) -> list[Row]:
    """Rows of every distance with its two N, and of the fractions recognised, in all and by class.

    The rows of ``generated`` must have the labels of ``halves``.
    """
    reference = moments_of(halves.features_b)
    rows: list[Row] = []
    for case, features in (
        ("floor", halves.features_a),
        ("vae_reconstruction", reconstructions),
        ("generated", generated),
    ):
        value = frechet_distance(moments_of(features), reference, allow_few=allow_few)
        rows.append({"section": "distance", "case": case, "metric": METRIC, "distance": value,
                     "n": len(features), "n_reference": reference.count})  # fmt: skip
    for case, features in (("held_out", halves.features_b), ("generated", generated)):
        hits = recognised(features, halves.labels, halves.features_a, halves.labels)
        by_class = {
            class_name: float(hits[halves.labels == label].mean())
            for label, class_name in enumerate(halves.class_names)
        }
        rows.append({"section": "recognised", "case": case, "fraction": float(hits.mean()),
                     "n": len(hits), "by_class": by_class})  # fmt: skip
    made = {"generated": "the model", "vae_reconstruction": "its VAE"}
    return [row | {"contender": made.get(row["case"], "avatars"), "status": "ok"} for row in rows]


def reconstruct(images: Images, vae: AutoencoderKL, batch_size: int = 16) -> Images:
    """Images uint8 (N, S, S, 3) through the encoder (its mean) and the decoder, as uint8 again."""
    from dit_engine.console.bars import Bar
    from dit_engine.decode import to_uint8

    vae = copy.deepcopy(vae).float()  # the stored weights may be in half precision
    device = vae.post_quant_conv.weight.device
    made = np.empty_like(images)
    for start in Bar(range(0, len(images), batch_size), "VAE reconstructions"):
        pixels = torch.from_numpy(np.array(images[start : start + batch_size])).to(device)
        with torch.inference_mode():
            mean, _ = vae.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0)
            made[start : start + len(pixels)] = to_uint8(vae.decode(mean))
    return made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `run` reads."""
    add_model_argument(parser)
    add_sampling_arguments(parser, steps=50, one_scale=True)
    add = parser.add_argument
    add("--samples", type=int, default=2400, help="generated images, over all classes")
    add("--first-seed", type=int, default=0, help="image i is made from first seed + i")
    add("--data", type=Path, default=Path("runs/data"), help="cache of held-out images, features")
    add("--allow-few", action="store_true", help="accept fewer images than features (1280)")
    add("--json", type=Path, help="write every figure and setting here")


def run(arguments: argparse.Namespace) -> int:
    """The command."""
    from dit_engine.engine import Engine
    from dit_engine.training.avatars import CLASSES

    samples, model, few = arguments.samples, arguments.model, arguments.allow_few
    if arguments.json is not None:
        check_file(arguments.json)  # before the long run
    if samples < 1 or samples % len(CLASSES):
        raise ValueError(f"samples {samples} is not a positive multiple of {len(CLASSES)} classes")
    if samples <= FEATURES and not few:
        raise ValueError(f"samples {samples} is not above {FEATURES}, the features (--allow-few)")
    engine = Engine.from_pretrained(model)
    vae, size = engine.vae, engine.image_size
    if vae is None or size is None:
        raise ValueError(f"model {model!r} has no VAE; {METRIC} is of images")
    if engine.label_names != CLASSES:
        raise ValueError(f"labels of {model!r} are {engine.label_names}; {CLASSES} are needed")
    network = load_network("lite0")
    seed, options, clock = arguments.first_seed, sampling_options(arguments), time.perf_counter()
    halves = load_halves(arguments.data, samples // len(CLASSES), size, network)
    images = GeneratedImages(engine, "generating", halves.labels.tolist(), seed, **options)
    with SetFeatures(network, ComparedSet("generated", images)) as found:
        if not found.read(_BATCH):
            raise KeyboardInterrupt
        generated = np.array(found.vectors())
    reconstructions = network.pooled(reconstruct(halves.images_a, vae), "their features")
    settings = images.record | network.record | {
        "model": str(model), "image_size": size, "first_seed": seed,
        "reference": "held-out avatars (half B)",
    }  # fmt: skip
    report = new_report("quality", describe(engine.device), settings)
    report["rows"] = compare(halves, reconstructions, generated, allow_few=few)
    report |= {"seconds": round(time.perf_counter() - clock, 1), "complete": True}
    show(report_tables(report))
    write(report, arguments.json)
    return 0
