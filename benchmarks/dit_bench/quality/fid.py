"""``dit-bench fid``: how far one set of images is from another.

``dit-bench fid SAMPLES REFERENCE`` compares folders, .npz files in ADM's format, or, with
``--model`` instead of SAMPLES, images that a model makes on the way. It prints FID, sFID, Inception
Score, precision and recall, each with its N. The reference may be statistics alone; precision and
recall are then left out. With ``--features lite0`` it prints FD-Lite0, never FID.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dit_bench.machine import describe
from dit_bench.outputs import check_outputs
from dit_bench.quality import NETWORKS
from dit_bench.quality.features import FeatureNetwork, SetFeatures, load_network
from dit_bench.quality.frechet import frechet_distance
from dit_bench.quality.image_sets import ComparedSet, GeneratedImages, open_set, try_step
from dit_bench.quality.metrics import NEIGHBOURS, SPLIT, precision_recall
from dit_bench.report import Report, Row, new_report, write
from dit_bench.show.reports import report_tables
from dit_bench.show.tables import show
from dit_engine.console.output import STDOUT
from dit_engine.console.parser import add_sampling_arguments, sampling_options
from dit_engine.console.run import INTERRUPTED


def evaluate(
    samples: ComparedSet,
    reference: ComparedSet,
    network: FeatureNetwork,
    batch_size: int = 32,
    allow_few: bool = False,
) -> Report:
    """A report of every figure with its N. After Ctrl-C its "failure" says where, and the figures
    are of the images that were read until then.

    Raises ValueError for sets that cannot be compared, before any image is read.
    """
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size} is not a positive integer")
    samples, reference = (network.accept(of, allow_few) for of in (samples, reference))
    report = new_report("fid", describe(torch.device("cpu")), {})
    with SetFeatures(network, samples) as found, SetFeatures(network, reference) as real:
        for side in (real, found):
            if "failure" not in report and not side.read(batch_size):
                total, name = len(side.of.images or ()), side.of.name
                report["failure"] = f"interrupted after {side.count} of {total} images of {name}"
        sets = [{"name": side.of.name, "n": side.moments[0].count, "images": side.count,
                 "size": None if side.of.images is None else list(side.of.images.size)}
                for side in (found, real)]  # fmt: skip
        report["settings"] = {**network.record, "reference": reference.name, "sets": sets}
        try:
            for row in _rows(found, real, allow_few, "failure" in report):
                report["rows"].append(row | {"case": samples.name, "contender": network.name})
        except KeyboardInterrupt:
            report.setdefault("failure", "interrupted while comparing")
    report["complete"] = "failure" not in report
    return report


def _rows(
    samples: SetFeatures, reference: SetFeatures, allow_few: bool, interrupted: bool
) -> Iterator[Row]:
    """The figures, quick ones first. What cannot be computed has a reason."""

    def row(metric: str, value: float | None, **more: Any) -> Row:
        status = {"distance": value, "status": "skipped" if value is None else "ok"}
        return {"section": "distance", "metric": metric, **status, **more}

    network, score = samples.network, samples.score
    if score is not None and score.count:
        remark = f"{score.splits} split{'s' * (score.splits > 1)} of up to {SPLIT}"
        yield row("Inception Score", score.value(), n=score.count, remark=remark)
    counts: dict[str, Any] = {
        "n": samples.moments[0].count, "n_reference": reference.moments[0].count
    }  # fmt: skip
    names = (network.metric, f"s{network.metric}")
    for name, a, b in zip(names, samples.moments, reference.moments, strict=True):
        if a is None or b is None:
            continue
        try:
            found = row(name, frechet_distance(a, b, allow_few=allow_few, title=name), **counts)
        except ValueError as error:
            if not interrupted:
                raise
            found = row(name, None, reason=str(error), **counts)
        if any(count is not None and count <= a.width for count in counts.values()):
            found["fewer_than_features"] = a.width
        yield found
    if interrupted:
        return
    counts = {
        key: None if side.of.images is None else side.count
        for key, side in (("n", samples), ("n_reference", reference))
    }
    values = (None, None)
    for side in (reference, samples):
        if side.of.images is None:
            counts["reason"] = f"{side.of.name} holds statistics, no images"
        elif side.count <= NEIGHBOURS:
            need = f"more than {NEIGHBOURS} are needed"
            counts["reason"] = f"{side.of.name} has {side.count} images; {need}"
    if "reason" not in counts:
        values = precision_recall(reference.vectors(), samples.vectors())
    of = "" if network.name == "inception" else f" ({network.name} features)"
    for name, value in zip(("precision", "recall"), values, strict=True):
        yield row(name + of, value, remark=f"k = {NEIGHBOURS}", **counts)


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
    """The command. Returns 0, or 130 if it was interrupted: then what was finished is printed."""
    from dit_engine.runtime import parse_device

    device = parse_device(arguments.device)
    check_outputs([arguments.json])
    sets, model = arguments.sets, arguments.model
    if len(sets) != (2 if model is None else 1):
        need = "SAMPLES and REFERENCE" if model is None else "the REFERENCE alone beside --model"
        raise ValueError(f"{len(sets)} sets ({', '.join(sets)}) are given; {need} must be")
    if model is not None and arguments.samples < 1:
        raise ValueError(f"samples {arguments.samples} is not a positive integer")
    reference = open_set(Path(sets[-1]))
    given = None if model is not None else open_set(Path(sets[0]))
    network = load_network(arguments.features, arguments.inception_weights, device)
    samples = given or _live_set(arguments, device)
    report = evaluate(samples, reference, network, arguments.batch_size, arguments.allow_few)
    if isinstance(samples.images, GeneratedImages):
        report["settings"] |= samples.images.record | {
            "samples": arguments.samples, "first_seed": arguments.first_seed
        }  # fmt: skip
    report["machine"] = describe(device)
    if arguments.json != STDOUT:
        show(report_tables(report))
    write(report, arguments.json)
    return 0 if report["complete"] else INTERRUPTED


def _json_file(text: str) -> Path:
    """Without its suffix, a name is probably one of the sets, which must not be overwritten."""
    if text != str(STDOUT) and not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{text!r} is no .json file; alone, --json comes last")
    return Path(text)


def _live_set(arguments: argparse.Namespace, device: torch.device) -> ComparedSet:
    """The images of --model, with which one step has been tried."""
    from dit_engine.engine import Engine

    model, seed = str(arguments.model), arguments.first_seed
    engine = Engine.from_pretrained(model, device=device)
    settings = sampling_options(arguments)
    labels = [i % engine.config.num_classes for i in range(arguments.samples)]
    images = GeneratedImages(engine, model, labels, seed, **settings)
    try_step(engine, min(max(arguments.batch_size, 1), len(images)), seed=seed, **settings)
    return ComparedSet(model, images)
