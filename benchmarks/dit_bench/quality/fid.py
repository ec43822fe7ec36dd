"""``dit-bench fid``: how far one set of images is from another.

``dit-bench fid SAMPLES REFERENCE`` compares folders, .npz files in ADM's format, or, with
``--model`` instead of SAMPLES, images that a model makes on the way. It prints FID, sFID, Inception
Score, precision and recall, each with its N. The reference may be statistics alone; precision and
recall are then left out. With ``--features lite0`` it prints FD-Lite0, never FID.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from dit_bench.machine import describe
from dit_bench.outputs import check_outputs
from dit_bench.quality import NETWORKS, metrics
from dit_bench.quality.features import FeatureNetwork, load_network, moments
from dit_bench.quality.image_sets import ComparedSet, generated, open_set, try_step
from dit_bench.report import Row, new_report, write
from dit_bench.show.reports import report_tables
from dit_bench.show.tables import show
from dit_engine.console.bars import Bar
from dit_engine.console.output import STDOUT
from dit_engine.console.parser import add_sampling_arguments, sampling_options


def figures(
    samples: ComparedSet,
    reference: ComparedSet,
    network: FeatureNetwork,
    batch_size: int,
    few: bool,
) -> list[Row]:
    """A row for every figure, with its N. few: accept fewer images than features.

    The sets must have passed ``network.accept``.
    """
    # The reference is read first: a model that makes the samples is slow.
    real, found = (
        network.read(side, batch_size) if side.count else None for side in (reference, samples)
    )
    rows: list[Row] = []

    def add(metric: str, value: float | None, n: int | None, **more: Any) -> None:
        status = "skipped" if value is None else "ok"
        rows.append({"section": "distance", "case": samples.name, "contender": network.name,
                     "status": status, "metric": metric, "distance": value, "n": n,
                     **more})  # fmt: skip

    if found is not None and found.log_probabilities is not None:
        splits = -(-samples.count // metrics.SPLIT)
        remark = f"{splits} split{'s' * (splits > 1)} of up to {metrics.SPLIT}"
        score = metrics.inception_score(found.log_probabilities)
        add("Inception Score", score, samples.count, remark=remark)
    names = (network.metric, f"s{network.metric}")[: 1 + bool(network.spatial_width)]
    with Bar(names, "distances", leave=False) as bar:
        for i, name in enumerate(bar):
            a, b = moments(samples, found, i), moments(reference, real, i)
            distance = metrics.frechet_distance(a, b, allow_few=few)
            add(name, distance, a.count, n_reference=b.count)
            if any(n is not None and n <= a.width for n in (a.count, b.count)):
                rows[-1]["fewer_than_features"] = a.width
    more: Row = {"n_reference": reference.count or None, "remark": f"k = {metrics.NEIGHBOURS}"}
    values: tuple[float | None, ...] = (None, None)
    if found is None or real is None:
        alone = reference.name if real is None else samples.name
        more["reason"] = f"{alone} holds statistics, no images"
    else:
        try:
            values = metrics.precision_recall(real.pooled, found.pooled)
        except ValueError as error:  # too few images
            more["reason"] = str(error)
    of = "" if network.name == "inception" else f" ({network.name} features)"
    for name, value in zip(("precision", "recall"), values, strict=True):
        add(name + of, value, samples.count or None, **more)
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `run` reads."""
    add = parser.add_argument
    add("sets", nargs="+", metavar="SET", help="SAMPLES and REFERENCE, or with --model REFERENCE: "
        "a folder of images, or an .npz (arr_0; or mu, sigma, mu_s, sigma_s)")  # fmt: skip
    add("--features", default="inception", choices=NETWORKS, help="lite0 prints FD-Lite0, not FID")
    add("--inception-weights", type=Path, help="file; DIT_INCEPTION_WEIGHTS unless given")
    add("--batch-size", type=int, default=32, help="images at a time")
    add("--allow-few", action="store_true", help="accept fewer images than features")
    add("--device", help="of the features and the model; CUDA if there is one unless given")
    add("--json", type=_json_file, nargs="?", const=STDOUT, metavar="FILE",
        help="every figure and setting, to a .json file or instead of the text")  # fmt: skip
    add("--model", help="file, directory, hub id, or 'builtin': its images are the samples")
    add("--samples", type=int, default=2400, help="images of --model, of all classes in turn")
    add("--first-seed", type=int, default=0, help="image i of --model is made from first seed + i")
    add_sampling_arguments(parser, one_scale=True)
    parser.set_defaults(guidance_scale=[1.5])  # as in the published FIDs


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from dit_engine.runtime import parse_device

    device = parse_device(arguments.device)
    check_outputs([arguments.json])
    sets, model = arguments.sets, arguments.model
    if len(sets) != (2 if model is None else 1):
        need = "SAMPLES and REFERENCE" if model is None else "the REFERENCE alone beside --model"
        raise ValueError(f"{len(sets)} sets ({', '.join(sets)}) are given; {need} must be")
    if model is not None and arguments.samples < 1:
        raise ValueError(f"samples {arguments.samples} is not a positive integer")
    if arguments.batch_size < 1:
        raise ValueError(f"batch size {arguments.batch_size} is not a positive integer")
    reference = open_set(Path(sets[-1]))
    given = None if model is not None else open_set(Path(sets[0]))
    network = load_network(arguments.features, arguments.inception_weights, device)
    few = arguments.allow_few
    samples = network.accept(given or _live_set(arguments, device), few)
    reference = network.accept(reference, few)
    rows = figures(samples, reference, network, arguments.batch_size, few)
    both = [{"name": side.name, "n": None if side.statistics else side.count, "images": side.count,
             "size": side.size and list(side.size)} for side in (samples, reference)]  # fmt: skip
    settings: dict[str, Any] = {**network.record, "reference": reference.name, "sets": both}
    if samples.record:
        settings |= samples.record | {
            "samples": arguments.samples, "first_seed": arguments.first_seed
        }  # fmt: skip
    report = new_report("fid", describe(device), settings)
    report |= {"rows": rows, "complete": True}
    if arguments.json != STDOUT:
        show(report_tables(report))
    write(report, arguments.json)
    return 0


def _json_file(text: str) -> Path:
    """A path that ends in .json: another name is probably one of the sets, never overwritten."""
    if text != str(STDOUT) and not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{text!r} is no .json file; alone, --json comes last")
    return Path(text)


def _live_set(arguments: argparse.Namespace, device: torch.device) -> ComparedSet:
    """The images of --model, after one trial step."""
    from dit_engine.engine import Engine

    model, seed = str(arguments.model), arguments.first_seed
    engine = Engine.from_pretrained(model, device=device)
    settings = sampling_options(arguments)
    labels = [i % engine.config.num_classes for i in range(arguments.samples)]
    try_step(engine, min(arguments.batch_size, len(labels)), seed=seed, **settings)
    return generated(engine, model, labels, seed, **settings)
