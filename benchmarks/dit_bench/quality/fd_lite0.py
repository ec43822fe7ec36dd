"""``dit-bench quality``: how good a model's images are, by FD-Lite0 and by class recognition.

The held-out avatars of each class are split into two halves, A and B. Three sets are measured by
their FD-Lite0 distance to B:

- floor: A itself. Real images against real ones show the distance that comes from a limited N.
- vae_reconstruction: A after the VAE's encoder and decoder. No DiT could do better.
- generated: the model's images, as many of each class as B has.

An image is recognised if its features lie nearest to the mean of its own class in A. The distance
is Euclidean, and each feature is divided by its standard deviation within classes. The fraction of
B that is recognised is the most that can be expected of the generated images.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dit_bench.machine import describe
from dit_bench.quality.features import FeatureNetwork, load_network
from dit_bench.quality.image_sets import Images, generated
from dit_bench.quality.lite0 import FEATURES
from dit_bench.quality.metrics import Features, frechet_distance, moments_of
from dit_bench.report import Row, new_report, write
from dit_bench.show.reports import report_tables
from dit_bench.show.tables import show
from dit_engine.console.bars import Bar
from dit_engine.console.output import check_file
from dit_engine.console.parser import add_model_argument, add_sampling_arguments, sampling_options

if TYPE_CHECKING:
    from dit_engine.vae import AutoencoderKL

METRIC = "FD-Lite0"

Labels = NDArray[np.int64]


class Halves(NamedTuple):
    """Held-out images of every class, split in two; everything is compared with B.

    images_a: uint8 (n, S, S, 3); features_*: (n, 1280); labels: (n,), the same for A and B.
    """

    images_a: Images
    features_a: Features
    features_b: Features
    labels: Labels
    class_names: tuple[str, ...]


def load_halves(data: Path, per_class: int, size: int, network: FeatureNetwork) -> Halves:
    """The first ``per_class`` held-out avatars of each class (A) and the next ``per_class`` (B);
    they are rendered once and kept in ``data``."""
    from dit_engine.training.avatars import load_avatars

    held_out = load_avatars(data, "held-out", 2 * per_class, size)
    features = network.pooled(held_out.images, "features of held-out images")
    in_a = np.arange(len(held_out)) // per_class % 2 == 0  # the images are ordered by class
    images, labels = held_out.images[in_a], held_out.labels[in_a]
    return Halves(images, features[in_a], features[~in_a], labels, held_out.class_names)


def recognised(
    features: Features, labels: Labels, known: Features, known_labels: Labels
) -> NDArray[np.bool_]:
    """(n,) whether each image lies nearest to the mean feature of its own class.

    Args:
        features, labels: (n, D) and (n,), the images to be recognised.
        known, known_labels: (m, D) and (m,), the images that give the means and the scale.
    """
    classes = np.unique(known_labels)
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
    """Rows of every distance with its two N, and of the recognised fractions, in all and by class.

    The rows of ``generated`` must have the labels of ``halves``.
    """
    _, a, b, labels, class_names = halves
    reference = moments_of(b)
    rows: list[Row] = []
    for case, made_by, features in (
        ("floor", "avatars", a),
        ("vae_reconstruction", "its VAE", reconstructions),
        ("generated", "the model", generated),
    ):
        value = frechet_distance(moments_of(features), reference, allow_few=allow_few)
        rows.append({"section": "distance", "case": case, "contender": made_by, "status": "ok",
                     "metric": METRIC, "distance": value, "n": len(features),
                     "n_reference": len(b)})  # fmt: skip
    for case, made_by, features in (("held_out", "avatars", b),
                                    ("generated", "the model", generated)):  # fmt: skip
        hits = recognised(features, labels, a, labels)
        by_class = {name: float(hits[labels == i].mean()) for i, name in enumerate(class_names)}
        rows.append({"section": "recognised", "case": case, "contender": made_by, "status": "ok",
                     "fraction": float(hits.mean()), "n": len(hits),
                     "by_class": by_class})  # fmt: skip
    return rows


def reconstruct(images: Images, vae: AutoencoderKL, batch_size: int = 16) -> Images:
    """Images uint8 (N, S, S, 3) → the same after the encoder (its mean) and the decoder, uint8."""
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
    add("--data", type=Path, default=Path("runs/data"), help="where the held-out images are kept")
    add("--allow-few", action="store_true", help="accept fewer images than features (1280)")
    add("--json", type=Path, help="write every figure and setting here")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
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
    source = generated(engine, "generated", halves.labels.tolist(), seed, **options)
    made = network.read(source, batch_size=64).pooled
    reconstructions = network.pooled(reconstruct(halves.images_a, vae), "their features")
    rows = compare(halves, reconstructions, made, allow_few=few)
    settings = source.record | network.record | {
        "model": str(model), "image_size": size, "first_seed": seed,
        "reference": "held-out avatars (half B)",
    }  # fmt: skip
    report = new_report("quality", describe(engine.device), settings)
    report |= {"rows": rows, "seconds": round(time.perf_counter() - clock, 1), "complete": True}
    show(report_tables(report))
    write(report, arguments.json)
    return 0
