"""``dit-bench fid``: how far one set of images is from another.

``dit-bench fid SAMPLES REFERENCE`` compares folders, .npz files in ADM's format, or, with
``--model`` in the place of SAMPLES, the images of a model made on the way. It prints FID, sFID,
Inception Score, precision and recall, N beside each. The reference may be statistics alone; there
is then no precision or recall. With ``--features lite0`` it prints FD-Lite0, never FID.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported
    from dit_engine.first import leave_out_of_path

    leave_out_of_path()
    from dit_engine.console.run import wait_briefly

    wait_briefly()

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_bench.outputs import STDOUT, check_outputs, write_json
from dit_bench.quality.features import load_network
from dit_bench.quality.image_sets import ComparedSet, GeneratedImages, open_set
from dit_bench.quality.probe import try_step
from dit_bench.quality.set_arguments import NETWORKS
from dit_bench.quality.set_distances import evaluate
from dit_bench.tables import fold
from dit_engine.console.parser import Parser, add_sampling_arguments, sampling_options
from dit_engine.console.run import entry, run_command
from dit_engine.io.printable import say

INTERRUPTED = 130  # exit code: what is printed is what was finished


def format_report(report: dict[str, Any]) -> str:
    """A line a figure, its N behind it."""
    samples, reference = report["samples"], report["reference"]
    lines = [f"{samples['name']} against {reference['name']}"]
    if report.get("settings"):
        lines.append(", ".join(f"{key} {value}" for key, value in report["settings"].items()))
    sizes = [s["size"] for s in (samples, reference)]
    if None not in sizes and sizes[0] != sizes[1]:
        shown = [f"{width}×{height}" for height, width in sizes]
        lines.append(f"note: images of {shown[0]} and of {shown[1]} pixels are compared")
    for name, m in report["metrics"].items():
        counts = f"N = {_count(m['n'])}"
        if "n_reference" in m:
            counts += f" against {_count(m['n_reference'])}"
        if "splits" in m:
            counts += f", {m['splits']} split{'s' * (m['splits'] > 1)} of up to {m['split']}"
        if "k" in m:
            counts += f", k = {m['k']}"
        value = "–" if m["value"] is None else _figure(m["value"])
        why = f" ({m['why']})" if "why" in m else ""
        if (width := m.get("fewer_than_features")) is not None:
            why += f"; CAUTION: fewer images than the {width} features: compares with no other N"
        lines.append(f"{name:<26} {value:>12}    {counts}{why}")
    if report["interrupted"]:
        lines.append(f"interrupted {report['interrupted']}; the figures are of what was finished")
    return "\n".join(lines)


def _figure(value: float) -> str:
    """Four digits, three below 1: more differ from one set of samples to the next."""
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}"


def _count(n: int | None) -> str:
    return "unknown, statistics only" if n is None else str(n)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `run` reads."""
    add = parser.add_argument
    add("sets", nargs="+", metavar="SET", help="SAMPLES and REFERENCE, or with --model REFERENCE: "
        "a folder of images, or an .npz (arr_0; or mu, sigma, mu_s, sigma_s)")  # fmt: skip
    add("--features", default="inception", choices=NETWORKS, help="lite0 prints FD-Lite0, not FID")
    add("--inception-weights", type=Path, help="file; DIT_INCEPTION_WEIGHTS unless given")
    add("--batch-size", type=int, default=32, help="images at a time")
    add("--allow-few", action="store_true", help="accept fewer images than features")
    add("--device", help="of the features and the model; CUDA unless given, where there is one")
    add("--json", type=_json_file, nargs="?", const=STDOUT, metavar="FILE",
        help="every figure and setting, to a .json file or in place of the text")  # fmt: skip
    add("--model", help="file, directory, hub id, or 'builtin': its images are the samples")
    add("--samples", type=int, default=2400, help="images of --model, of all classes in turn")
    add("--first-seed", type=int, default=0, help="image i of --model is made from first seed + i")
    add_sampling_arguments(parser, one_scale=True)
    parser.set_defaults(guidance_scale=[1.5])  # of the published FIDs


def run(arguments: argparse.Namespace) -> int:
    """The command: 0, 2 for a user's error, 130 for what was interrupted."""

    def command() -> int:
        from dit_engine.runtime import parse_device

        device = parse_device(arguments.device)
        check_outputs([arguments.json])
        _check_count(arguments)
        reference = open_set(Path(arguments.sets[-1]))
        given = None if arguments.model is not None else open_set(Path(arguments.sets[0]))
        network = load_network(arguments.features, arguments.inception_weights, device)
        settings: dict[str, Any] = {}
        samples = given or _live_set(arguments, device, settings)
        report = evaluate(samples, reference, network, arguments.batch_size, arguments.allow_few)
        report |= {"settings": settings or None, **_surroundings()}
        if arguments.json != STDOUT:
            say(fold(format_report(report)))
        write_json(report, arguments.json)
        return INTERRUPTED if report["interrupted"] else 0

    return run_command(command)


def _json_file(text: str) -> Path:
    """A name without the suffix is likelier one of the sets, which must not be written over."""
    if text != str(STDOUT) and not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{text!r} is no .json file; alone, --json comes last")
    return Path(text)


def _check_count(arguments: argparse.Namespace) -> None:
    sets, model = arguments.sets, arguments.model
    wanted = 2 if model is None else 1
    if len(sets) != wanted:
        need = "SAMPLES and REFERENCE" if model is None else "the REFERENCE alone beside --model"
        raise ValueError(f"{len(sets)} sets ({', '.join(sets)}) are given; {need} must be")


def _live_set(arguments: argparse.Namespace, device: Any, record: dict[str, Any]) -> ComparedSet:
    """The images of --model; ``record`` gets the settings that they are made with."""
    from dit_engine.engine import Engine

    model = arguments.model
    engine = Engine.from_pretrained(model, device=device)
    if engine.image_size is None:
        raise ValueError(f"model {model!r} has no VAE; distances are of images")
    settings = sampling_options(arguments)

    def generate(labels: Sequence[int], seeds: Sequence[int]) -> Any:
        made = engine.generate(list(labels), seeds=list(seeds), output="np", **settings)
        record.update(made.settings)
        return np.asarray(made.images)

    images = GeneratedImages(
        str(model),
        generate,
        arguments.samples,
        engine.config.num_classes,
        engine.image_size,
        arguments.first_seed,
    )
    count = min(max(arguments.batch_size, 1), len(images))
    try_step(engine, count, seed=arguments.first_seed, **settings)
    record |= {"samples": arguments.samples, "first_seed": arguments.first_seed}
    return ComparedSet(str(model), images)


def _surroundings() -> dict[str, Any]:
    from dit_bench.hardware import describe_hardware

    return {"hardware": describe_hardware()}


@entry
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        "python -m dit_bench.quality.fid", "FID and other distances between sets of images."
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
