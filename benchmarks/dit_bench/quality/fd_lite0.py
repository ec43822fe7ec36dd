"""How good a model's images are: FD-Lite0 against held-out images, and class recognition.

``python -m dit_bench.quality.fd_lite0 --model builtin`` splits the held-out avatars of each class
in two
halves, A and B, and prints three FD-Lite0 distances to B:

- floor: of A. Real images against real ones: what a limited N costs.
- vae_reconstruction: of A after the VAE's encoder and decoder. The best that a DiT could do.
- generated: of the model's images, as many of each class as B has.

An image is recognised when its features lie nearest (Euclidean, each feature divided by its
standard deviation within classes) to the mean of its own class in A. The fraction of B that is
recognised is the ceiling for the generated images.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported
    from dit_engine.first import leave_out_of_path

    leave_out_of_path()
    from dit_engine.console.run import wait_briefly

    wait_briefly()

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from dit_bench.hardware import describe_hardware
from dit_bench.outputs import finite
from dit_bench.quality.frechet import frechet_distance, moments_of
from dit_bench.quality.held_out import Features, Halves, load_halves
from dit_bench.quality.lite0 import FEATURES, WEIGHTS_SHA256, Lite0, extract, load_lite0
from dit_bench.tables import fold
from dit_engine.console.output import check_file
from dit_engine.console.parser import (
    Parser,
    add_model_argument,
    add_sampling_arguments,
    sampling_options,
)
from dit_engine.console.run import entry, run_command
from dit_engine.io.files import atomic_path
from dit_engine.io.printable import say
from dit_engine.io.provenance import without_paths

if TYPE_CHECKING:
    from dit_engine.engine import Engine
    from dit_engine.vae import AutoencoderKL

METRIC = "FD-Lite0"
_CHUNK = 64  # images between two ticks of the progress bar


def recognised(
    features: Features,
    labels: NDArray[np.int64],
    known: Features,
    known_labels: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """(n,) whether each image lies nearest to the mean feature of its own class.

    Args:
        features, labels: (n, D) and (n,), the images to be recognised.
        known, known_labels: (m, D) and (m,), images that give the means and the scale.

    Raises ValueError for a label that no known image has.
    """
    classes = np.unique(known_labels)
    unknown = np.setdiff1d(labels, classes)
    if len(unknown):
        raise ValueError(f"label {unknown[0]} has no known image; known are {classes.tolist()}")
    means = np.stack([known[known_labels == c].mean(axis=0, dtype=np.float64) for c in classes])
    within = known - means[np.searchsorted(classes, known_labels)]
    spread = within.std(axis=0)
    spread[spread == 0] = np.inf  # a constant feature says nothing of the class
    a, b = features / spread, means / spread
    squared = (a * a).sum(1)[:, None] - 2 * a @ b.T + (b * b).sum(1)[None]  # (n, classes)
    return classes[squared.argmin(axis=1)] == labels


def compare(
    halves: Halves, reconstructions: Features, generated: Features, *, allow_few: bool = False
) -> dict[str, Any]:
    """Every distance with its two N, and the fractions recognised, over all and by class.

    Rows of ``generated`` have the labels of ``halves``.
    """
    reference = moments_of(halves.features_b)
    distances = {}
    for name, features in (
        ("floor", halves.features_a),
        ("vae_reconstruction", reconstructions),
        ("generated", generated),
    ):
        value = frechet_distance(moments_of(features), reference, allow_few=allow_few)
        distances[name] = {"value": value, "n": len(features), "n_reference": reference.count}
    fractions = {}
    for name, features in (("held_out", halves.features_b), ("generated", generated)):
        hits = recognised(features, halves.labels, halves.features_a, halves.labels)
        by_class = {
            class_name: float(hits[halves.labels == label].mean())
            for label, class_name in enumerate(halves.class_names)
        }
        fractions[name] = {"fraction": float(hits.mean()), "n": len(hits), "by_class": by_class}
    return {"distances": distances, "recognised": fractions}


def reconstruct(
    images: NDArray[np.uint8], vae: AutoencoderKL, batch_size: int = 16
) -> NDArray[np.uint8]:
    """Images uint8 (N, S, S, 3) through the encoder (its mean) and the decoder, as uint8 again."""
    from dit_engine.console.bars import Bar
    from dit_engine.decode import to_uint8

    vae = copy.deepcopy(vae).float()  # the stored weights may be half as wide
    device = vae.post_quant_conv.weight.device
    made = np.empty_like(images)
    for start in Bar(range(0, len(images), batch_size), "VAE reconstructions"):
        pixels = torch.from_numpy(np.array(images[start : start + batch_size])).to(device)
        with torch.inference_mode():
            mean, _ = vae.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0)
            made[start : start + len(pixels)] = to_uint8(vae.decode(mean))
    return made


def generate_features(
    engine: Engine, labels: NDArray[np.int64], first_seed: int, network: Lite0, **settings: Any
) -> tuple[Features, dict[str, Any]]:
    """Features (N, 1280) of one generated image a label, and the settings that the engine records.

    Image i has seed ``first_seed + i``; ``settings`` go to `Engine.generate`.
    """
    from dit_engine.console.bars import Bar

    parts, record = [], {}
    # The delay keeps an empty bar from being drawn above the error for an invalid setting.
    with Bar(total=len(labels), desc="generating", unit="img", delay=0.5) as bar:
        for start in range(0, len(labels), _CHUNK):
            part = [int(label) for label in labels[start : start + _CHUNK]]
            seeds = list(range(first_seed + start, first_seed + start + len(part)))
            result = engine.generate(part, seeds=seeds, output="np", **settings)
            parts.append(extract(result.images, network))
            record = result.settings
            bar.update(len(part))
    return np.concatenate(parts), record


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that the command prints and writes, as one JSON-ready dictionary."""
    from dit_engine.engine import Engine
    from dit_engine.training.avatars import CLASSES

    samples, model = arguments.samples, arguments.model
    if samples < 1 or samples % len(CLASSES):
        raise ValueError(f"samples {samples} is not a positive multiple of {len(CLASSES)} classes")
    if samples <= FEATURES and not arguments.allow_few:
        raise ValueError(f"samples {samples} is not above {FEATURES}, the features (--allow-few)")
    engine = Engine.from_pretrained(model)
    if engine.vae is None or engine.image_size is None:
        raise ValueError(f"model {model!r} has no VAE; {METRIC} is of images")
    if engine.label_names != CLASSES:
        raise ValueError(f"labels of {model!r} are {engine.label_names}; {CLASSES} are needed")

    seconds: dict[str, float] = {}
    network = load_lite0()
    clock = time.perf_counter()
    halves = load_halves(arguments.data, samples // len(CLASSES), engine.image_size, network)
    seconds["held_out"] = time.perf_counter() - clock
    clock = time.perf_counter()
    generated, settings = generate_features(
        engine,
        halves.labels,
        arguments.first_seed,
        network,
        **sampling_options(arguments),
    )
    seconds["generated"] = time.perf_counter() - clock
    clock = time.perf_counter()
    reconstructions = extract(reconstruct(halves.images_a, engine.vae), network)
    seconds["vae_reconstruction"] = time.perf_counter() - clock
    return {
        "metric": METRIC,
        "feature_weights_sha256": WEIGHTS_SHA256,
        "model": str(model),
        "image_size": engine.image_size,
        "first_seed": arguments.first_seed,
        "settings": settings,
        **compare(halves, reconstructions, generated, allow_few=arguments.allow_few),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "hardware": describe_hardware(),
    }


def format_report(report: dict[str, Any]) -> str:
    """The figures as a few lines of text, N beside each."""
    settings = ", ".join(f"{key} {value}" for key, value in report["settings"].items())
    lines = [f"{report['model']} at {report['image_size']} px: {settings}"]
    for name, d in report["distances"].items():
        counts = f"N = {d['n']} against {d['n_reference']}"
        lines.append(f"{METRIC} {name:<18} {d['value']:8.2f}    {counts}")
    for name, r in report["recognised"].items():
        worst = min(r["by_class"], key=r["by_class"].__getitem__)
        lowest = f"lowest: {worst} {r['by_class'][worst]:.1%}"
        lines.append(f"recognised {name:<16} {r['fraction']:8.1%}    N = {r['n']}, {lowest}")
    hardware = report["hardware"]
    lines.append(
        f"{hardware['cpu']}, {hardware['torch_threads']} threads, torch {hardware['torch']}"
    )
    return "\n".join(lines)


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write the report as JSON, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(
            json.dumps(finite(without_paths(report)), indent=2) + "\n", encoding="utf-8"
        )


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "python -m dit_bench.quality.fd_lite0",
        "FD-Lite0 of a model's images against held-out avatars.",
    )
    add_model_argument(parser)
    add_sampling_arguments(parser, steps=50, one_scale=True)
    add = parser.add_argument
    add("--samples", type=int, default=2400, help="generated images, over all classes")
    add("--first-seed", type=int, default=0, help="image i is made from first seed + i")
    add("--data", type=Path, default=Path("runs/data"), help="cache of held-out images, features")
    add("--allow-few", action="store_true", help="accept fewer images than features (1280)")
    add("--json", type=Path, help="write every figure and setting here")
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)

    def command() -> int:
        if arguments.json is not None:
            check_file(arguments.json)  # before the long run
        report = measure(arguments)
        say(fold(format_report(report)))
        if arguments.json is not None:
            write_report(report, arguments.json)
        return 0

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
