"""Paired sampling: how far a backend's images are from those of the reference, noise being equal.

``python -m dit_bench.quality.parity --subjects lean/bf16 lean/int8`` makes the same images
(labels, seeds,
and with them every draw) by eager float32 and by each subject, a backend and a precision, and
reports the error of the latents after every step and of the final images. Paired, a difference
says what the arithmetic costs; two Fréchet distances would mostly differ by their samples.

``--features lite0`` or ``inception`` adds the Fréchet distance between the two sets, and
``--reference-set`` that of each to a reference and |ΔFID| with its bootstrap interval.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported
    from dit_engine.first import leave_out_of_path

    leave_out_of_path()
    from dit_engine.console.run import wait_briefly

    wait_briefly()

import argparse
import contextlib
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dit_bench.generation_check import Recorder
from dit_bench.hardware import describe_hardware
from dit_bench.quality.fd_lite0 import write_report
from dit_bench.quality.features import load_network
from dit_bench.quality.paired_sets import SetComparison, format_row, open_reference
from dit_bench.quality.probe import try_step
from dit_bench.quality.set_arguments import RESAMPLES, add_set_arguments, refuse_given
from dit_bench.tables import fold
from dit_engine.backends import PRECISIONS, resolve_backend
from dit_engine.console.output import check_file
from dit_engine.console.parser import (
    Parser,
    add_model_argument,
    add_sampling_arguments,
    sampling_options,
)
from dit_engine.console.run import entry, run_command
from dit_engine.decode import to_uint8
from dit_engine.errors import NotFinite
from dit_engine.io.printable import say
from dit_engine.plan import resolve_seeds

if TYPE_CHECKING:
    from dit_engine.engine import Engine

REFERENCE = ("eager", "fp32")
INTERRUPTED = 130  # exit code
PEAK = 1.0  # of images in [0, 1]


def trajectory(
    engine: Engine,
    labels: Sequence[int],
    check: Callable[[], object] = lambda: None,
    **settings: Any,
) -> tuple[Tensor, dict]:
    """Latents after every step, (steps, N, C, S, S) on the CPU, and the engine's record.

    ``check`` is called after every step. Latents that are not finite are given as they are, with an
    empty record: how far a subject is off is what is asked here.
    """
    recorder, record = Recorder(check), {}
    with contextlib.suppress(NotFinite):
        made = engine.generate(labels, output="latent", callback=recorder, **settings)
        record = made.settings
    return recorder.latents(), record


def relative_errors(found: Tensor, reference: Tensor) -> np.ndarray:
    """(steps, N) root mean square of the difference over that of the reference, image by image."""
    difference = (found - reference).double().flatten(2).norm(dim=2)
    return (difference / reference.double().flatten(2).norm(dim=2)).numpy()


def psnr(found: Tensor, reference: Tensor) -> np.ndarray:
    """(N,) peak signal-to-noise ratio in dB of images (N, 3, H, W) in [0, 1]; inf where equal."""
    squared = (found - reference).double().square().flatten(1).mean(1).numpy()
    with np.errstate(divide="ignore"):
        return 10 * np.log10(PEAK**2 / squared)


class _Found:
    """What is gathered of one backend, part by part."""

    def __init__(self) -> None:
        self.errors: list[np.ndarray] = []  # (steps, n)
        self.ratios: list[np.ndarray] = []  # (n,), dB
        self.features: list[np.ndarray] = []  # (n, D)


def compare(
    engine: Engine,
    labels: Sequence[int],
    subjects: Sequence[tuple[str, str]],
    *,
    sets: SetComparison | None = None,
    seed: int | None = None,
    quiet: bool = False,
    check: Callable[[], object] = lambda: None,
    **settings: Any,
) -> dict[str, Any]:
    """Errors of every subject (backend, precision) against the reference, N beside them.

    Images are decoded by the reference's VAE in float32: what differs is the transformer. They are
    made in the engine's batches. After Ctrl-C the report holds those batches that are finished by
    all subjects, and "interrupted" is True; before the first of them, KeyboardInterrupt is raised.

    Args:
        sets: what is asked of the sets as a whole, if anything.
        seed: image i is made from seed + i; None is a random one.
        quiet: no progress bars.
        check: called after every step, every resample and every batch of a reference that is yet
            to be read; it may raise KeyboardInterrupt.

    Raises ValueError for sets without images or with too few.
    """
    from dit_engine.console.bars import Bar

    labels = list(labels)
    if sets is not None:
        if engine.vae is None:
            raise ValueError("the model has no VAE; Fréchet distances are of images")
        sets.check(len(labels))
        sets = sets.with_reference(quiet, check)
    seeds = resolve_seeds(seed, None, len(labels), "per-image")
    decode = _decoder(engine)
    runs = [REFERENCE, *subjects]
    gathered = [_Found() for _ in runs]
    record: dict[str, Any] = {}
    finished, interrupted = 0, False
    every = len(labels) * len(runs)
    with Bar(total=every, desc="sampling", unit="img", delay=2.0, disable=quiet) as bar:
        try:
            while finished < len(labels):
                part = slice(finished, finished + engine.max_batch_size)
                options = {**settings, "seeds": seeds[part], "check": check}
                found, record = _batch(engine, labels[part], runs, decode, sets, options, bar)
                for total, own in zip(gathered, found, strict=True):
                    total.errors += own.errors
                    total.ratios += own.ratios
                    total.features += own.features
                finished = min(part.stop, len(labels))
        except KeyboardInterrupt:
            if not finished:
                raise
            interrupted = True
    if sets is not None and not sets.suffices(finished):
        sets = None  # only after an interruption
    rows = [
        _row(subject, found, gathered[0], sets, {"quiet": quiet, "check": check})
        for subject, found in zip(subjects, gathered[1:], strict=True)
    ]
    if sets is not None:  # Ctrl-C in a bootstrap leaves fewer resamples
        done = [row["sets"].get("resamples", sets.resamples) for row in rows]
        interrupted |= min(done, default=sets.resamples) < sets.resamples
    return {"n": finished, "settings": record, "subjects": rows, "interrupted": interrupted}


def _batch(
    engine: Engine,
    labels: list[int],
    runs: Sequence[tuple[str, str]],
    decode: Callable[[Tensor], Tensor] | None,
    sets: SetComparison | None,
    options: dict[str, Any],
    bar: Any,
) -> tuple[list[_Found], dict[str, Any]]:
    """Every run, the reference first, of one batch; and the engine's record of the reference."""
    every, reference, images, record = [], None, None, {}
    for backend, precision in runs:
        latents, settings = trajectory(
            engine, labels, backend=backend, precision=precision, **options
        )
        if reference is None:
            if not settings:
                raise NotFinite(f"the reference, {backend} {precision}, is not finite")
            reference, record = latents, settings
        found = _Found()
        found.errors.append(relative_errors(latents, reference))
        if decode is not None:
            decoded = decode(latents[-1])
            images = decoded if images is None else images
            found.ratios.append(psnr(decoded, images))
            if sets is not None:
                found.features.append(sets.network.extract(to_uint8(decoded * 2 - 1)).pooled)
        every.append(found)
        bar.update(len(labels))
    return every, record


def _row(
    subject: tuple[str, str],
    found: _Found,
    reference: _Found,
    sets: SetComparison | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    errors = np.concatenate(found.errors, axis=1)  # (steps, N)
    row: dict[str, Any] = {
        "backend": subject[0],
        "precision": subject[1],
        "latent_error_by_step": errors.mean(axis=1).tolist(),
        "final_latent_error": {"mean": float(errors[-1].mean()), "max": float(errors[-1].max())},
    }
    if found.ratios:
        ratio = np.concatenate(found.ratios)
        row["psnr_db"] = {
            "median": float(np.median(ratio)),
            "min": float(ratio.min()),
            "not_finite": int(np.isnan(ratio).sum()),  # images; those that are equal have infinity
        }
    if sets is not None:
        eager = np.concatenate(reference.features)
        row["sets"] = sets.compare(np.concatenate(found.features), eager, **options)
    return row


def _decoder(engine: Engine) -> Callable[[Tensor], Tensor] | None:
    """From latents (n, C, S, S) to images (n, 3, H, W) in [0, 1]; None without a VAE."""
    if engine.vae is None:
        return None
    vae = copy.deepcopy(engine.vae).float()  # the stored weights may be half as wide

    def decode(latents: Tensor) -> Tensor:
        z = vae.config.denormalise(latents).to(vae.post_quant_conv.weight.device)
        with torch.inference_mode():
            parts = [vae.decode(part).cpu() for part in z.split(8)]
        return (torch.cat(parts).clamp(-1, 1) + 1) / 2

    return decode


def format_report(report: dict[str, Any]) -> str:
    """A line a subject, N first; below it what is said of the sets."""
    steps = len(report["subjects"][0]["latent_error_by_step"])
    settings = report["settings"]
    head = (
        f"{report['model']}, N = {report['n']}, {settings['sampler']}, {steps} steps, against "
        f"{' '.join(REFERENCE)}; error of the latents, relative, and of the images"
    )
    columns = f"{'first step':>11} {'half way':>11} {'final':>11} {'worst':>11} {'PSNR dB':>9}"
    lines = [head, f"{'':<20} {columns} {'worst':>7}"]
    for row in report["subjects"]:
        by_step, final = row["latent_error_by_step"], row["final_latent_error"]
        ratio = row.get("psnr_db", {"median": float("nan"), "min": float("nan")})
        lines.append(
            f"{row['backend'] + ' ' + row['precision']:<20} {by_step[0]:>11.2e} "
            f"{by_step[steps // 2]:>11.2e} {final['mean']:>11.2e} {final['max']:>11.2e} "
            f"{ratio['median']:>9.1f} {ratio['min']:>7.1f}"
        )
        if "sets" in row:
            lines += format_row(row["sets"])
    if report.get("interrupted"):
        lines.append(f"interrupted after {report['n']} images; the figures are of these")
    return "\n".join(lines)


def parse_subject(text: str) -> tuple[str, str]:
    """ "lean/int8" → ("lean", "int8"). Raises ValueError."""
    backend, slash, precision = text.rpartition("/")
    if not slash or not backend or not precision:
        raise ValueError(f"subject {text!r} is no backend/precision, such as lean/bf16")
    if precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise ValueError(f"subject {text!r}: precision {precision!r} is none of {known}")
    return resolve_backend(backend), precision


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "python -m dit_bench.quality.parity", "Backends against eager float32, noise equal."
    )
    add_model_argument(parser)
    add_sampling_arguments(parser, steps=50, one_scale=True, backend=False)
    add = parser.add_argument
    add("--subjects", nargs="+", default=["lean/fp32", "lean/bf16"], metavar="BACKEND/PRECISION")
    add("--samples", type=int, default=32, help="images, of all classes in turn")
    add_set_arguments(parser)
    add("--json", type=Path, help="write every figure and setting here")
    return parser


def set_comparison(arguments: argparse.Namespace, device: torch.device) -> SetComparison | None:
    """What the arguments ask of the sets as a whole; None for nothing. Of the reference no image
    is read yet.

    Raises ValueError, OSError or ImportError for what cannot be compared.
    """
    features, path = arguments.features, arguments.reference_set
    if path is None:
        refuse_given(arguments, ["resamples"], "--reference-set")
    if features is None and path is None:
        refuse_given(arguments, ["inception_weights", "allow_few"], "--features or --reference-set")
        return None
    few = arguments.allow_few
    network = load_network(features or "inception", arguments.inception_weights, device)
    resamples = RESAMPLES if arguments.resamples is None else arguments.resamples
    sets = SetComparison(network, None, resamples, few)
    sets.check(arguments.samples)
    if path is None:
        return sets
    return replace(sets, unread=open_reference(path, network, few))


@entry
def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)

    def command() -> int:
        from dit_engine.engine import Engine

        subjects = [parse_subject(text) for text in arguments.subjects]
        if arguments.samples < 1:
            raise ValueError(f"samples {arguments.samples} is not a positive integer")
        if arguments.json is not None:
            check_file(arguments.json)  # before the long run
        engine = Engine.from_pretrained(arguments.model)
        labels = [i % engine.config.num_classes for i in range(arguments.samples)]
        options: dict[str, Any] = sampling_options(arguments) | {"seed": 0}
        for backend, precision in subjects:
            count = min(len(labels), engine.max_batch_size)
            try_step(engine, count, backend=backend, precision=precision, **options)
        sets = set_comparison(arguments, engine.device)
        if sets is not None and engine.vae is None:
            metric = sets.network.metric
            raise ValueError(f"model {arguments.model!r} has no VAE; {metric} is of images")
        options |= {"sets": sets}
        report = {"model": str(arguments.model), **compare(engine, labels, subjects, **options)}
        if sets is not None:
            report["features"] = sets.network.record
        report["hardware"] = describe_hardware()
        say(fold(format_report(report)))
        if arguments.json is not None:
            write_report(report, arguments.json)
        return INTERRUPTED if report["interrupted"] else 0

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
