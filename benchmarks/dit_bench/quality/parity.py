"""``dit-bench parity``: how far a backend's images are from the reference's, noise being equal.

``dit-bench parity --subjects lean/bf16 lean/int8`` makes the same images (with the same labels,
seeds and random draws) with eager float32 and with each subject, which is a backend and a
precision. It reports the error of the latents after every step and of the final images. Because the
images are paired, a difference says what the arithmetic costs; two separate Fréchet distances would
mostly differ by chance.

``--features lite0`` or ``inception`` adds the Fréchet distance between the two sets, and
``--reference-set`` that of each to a reference, and |ΔFID| with its bootstrap interval.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dit_bench.machine import describe
from dit_bench.quality.image_sets import try_step
from dit_bench.quality.paired import SetComparison, add_set_arguments, set_comparison
from dit_bench.report import Row, new_report, write
from dit_bench.show.reports import report_tables
from dit_bench.show.tables import show
from dit_bench.speed.generation import Recorder
from dit_engine.backends import PRECISIONS, resolve_backend
from dit_engine.console.output import check_file
from dit_engine.console.parser import add_model_argument, add_sampling_arguments, sampling_options
from dit_engine.console.run import INTERRUPTED
from dit_engine.decode import LatentDecoder, to_uint8
from dit_engine.errors import NotFinite
from dit_engine.sampling.noise import resolve_seeds

if TYPE_CHECKING:
    from dit_engine.engine import Engine

REFERENCE = ("eager", "fp32")
PEAK = 1.0  # of images in [0, 1]


def trajectory(
    engine: Engine,
    labels: Sequence[int],
    check: Callable[[], object] = lambda: None,
    **settings: Any,
) -> tuple[Tensor, dict]:
    """Latents after every step, (steps, N, C, S, S) on the CPU, and the engine's record.

    ``check`` is called after every step. If the latents are not finite, they are returned as they
    are, with an empty record, since the question here is how far off a subject is.
    """
    recorder, record = Recorder(check), {}
    with contextlib.suppress(NotFinite):
        made = engine.generate(labels, output="latent", callback=recorder, **settings)
        record = made.settings
    return recorder.latents(), record


def relative_errors(found: Tensor, reference: Tensor) -> np.ndarray:
    """(steps, N): for each image, the norm of the difference divided by that of the reference."""
    difference = (found - reference).double().flatten(2).norm(dim=2)
    return (difference / reference.double().flatten(2).norm(dim=2)).numpy()


def psnr(found: Tensor, reference: Tensor) -> np.ndarray:
    """(N,) peak signal-to-noise ratio in dB of images (N, 3, H, W) in [0, 1]; inf if equal."""
    squared = (found - reference).double().square().flatten(1).mean(1).numpy()
    with np.errstate(divide="ignore"):
        return 10 * np.log10(PEAK**2 / squared)


@dataclass(frozen=True)
class _Found:
    """What one run of one batch gave: errors (steps, n), PSNR (n,) in dB, features (n, D)."""

    errors: np.ndarray
    ratios: np.ndarray | None = None
    features: np.ndarray | None = None


def compare(
    engine: Engine,
    labels: Sequence[int],
    subjects: Sequence[tuple[str, str]],
    *,
    model: str = "",
    sets: SetComparison | None = None,
    seed: int | None = None,
    quiet: bool = False,
    check: Callable[[], object] = lambda: None,
    **settings: Any,
) -> list[Row]:
    """Errors of every subject (backend, precision) against the reference, with their N.

    All images are decoded by the reference's VAE in float32, so that only the transformer differs.
    They are made in the engine's batches. After Ctrl-C the rows are of the batches that all
    subjects have finished, and "interrupted" is True; before the first of them, KeyboardInterrupt
    is raised.

    Args:
        model: what the rows call the model.
        sets: how the whole sets are compared, if they are.
        seed: image i is made from seed + i; None chooses a random seed.
        quiet: no progress bars.
        check: called after every step, after every resample, and after every batch of a reference
            that is read here; it may raise KeyboardInterrupt.

    Raises ValueError for sets without images or with too few.
    """
    from dit_engine.console.bars import Bar

    labels = list(labels)
    if sets is not None:
        if engine.vae is None:
            raise ValueError(f"model {model!r} has no VAE; {sets.network.metric} is of images")
        sets.check(len(labels))
        sets = sets.with_moments(quiet, check)
    seeds = resolve_seeds(seed, None, len(labels), "per-image")
    decode = None if engine.vae is None else LatentDecoder(engine.vae, engine.device)
    runs = [REFERENCE, *subjects]
    gathered: list[list[_Found]] = []  # of each batch, one for each run
    record: dict[str, Any] = {}
    finished, interrupted = 0, False
    with Bar(total=len(labels) * len(runs), desc="sampling", unit="img", delay=2.0,
             disable=quiet) as bar:  # fmt: skip
        try:
            while finished < len(labels):
                part = slice(finished, finished + engine.max_batch_size)
                options = {**settings, "seeds": seeds[part], "check": check}
                found, record = _batch(engine, labels[part], runs, decode, sets, options, bar)
                gathered.append(found)
                finished = min(part.stop, len(labels))
        except KeyboardInterrupt:
            if not finished:
                raise
            interrupted = True
    common = {"model": model, "case": model, "n": finished, "settings": record}
    reference, *others = zip(*gathered, strict=True)
    rows = [
        _errors(*subject, found) | common for subject, found in zip(subjects, others, strict=True)
    ]
    if sets is not None and sets.suffices(finished):  # after an interruption there may be too few
        for row, found in zip(rows, others, strict=True):
            row["sets"] = sets.compare(_features(found), _features(reference), quiet, check)
            row["sets"]["features"] = sets.network.record
            # Ctrl-C in a bootstrap leaves fewer resamples.
            interrupted |= row["sets"].get("resamples", sets.resamples) < sets.resamples
    return [row | {"interrupted": interrupted} for row in rows]


def _errors(backend: str, precision: str, found: Sequence[_Found]) -> Row:
    """The row of a subject, without its sets and without what all rows have in common."""
    errors = np.concatenate([each.errors for each in found], axis=1)  # (steps, N)
    row: Row = {
        "section": "parity", "contender": f"{backend} {precision}", "role": "subject",
        "status": "ok", "backend": backend, "precision": precision,
        "latent_error_by_step": errors.mean(axis=1).tolist(),
        "final_latent_error": {"mean": float(errors[-1].mean()), "max": float(errors[-1].max())},
    }  # fmt: skip
    if ratios := [each.ratios for each in found if each.ratios is not None]:
        ratio = np.concatenate(ratios)
        row["psnr_db"] = {
            "median": float(np.median(ratio)),
            "min": float(ratio.min()),
            "not_finite": int(np.isnan(ratio).sum()),  # images; equal ones have infinity
        }
    return row


def _features(found: Sequence[_Found]) -> np.ndarray:
    return np.concatenate([each.features for each in found if each.features is not None])


def _batch(
    engine: Engine,
    labels: list[int],
    runs: Sequence[tuple[str, str]],
    decode: LatentDecoder | None,
    sets: SetComparison | None,
    options: dict[str, Any],
    bar: Any,
) -> tuple[list[_Found], dict[str, Any]]:
    """One batch by every run, the reference first, and the engine's record of the reference."""
    every, reference, images, record = [], None, None, {}
    for backend, precision in runs:
        latents, settings = trajectory(
            engine, labels, backend=backend, precision=precision, **options
        )
        if reference is None:
            if not settings:
                raise NotFinite(f"the reference, {backend} {precision}, is not finite")
            reference, record = latents, settings
        errors, ratios, features = relative_errors(latents, reference), None, None
        if decode is not None:
            with torch.inference_mode():
                decoded = decode(latents[-1].to(engine.device), "fp32").cpu()
            decoded = (decoded.clamp(-1, 1) + 1) / 2
            images = decoded if images is None else images
            ratios = psnr(decoded, images)
            if sets is not None:
                features = sets.network.extract(to_uint8(decoded * 2 - 1)).pooled
        every.append(_Found(errors, ratios, features))
        bar.update(len(labels))
    return every, record


def parse_subject(text: str) -> tuple[str, str]:
    """ "lean/int8" → ("lean", "int8"). Raises ValueError."""
    backend, slash, precision = text.rpartition("/")
    if not slash or not backend or not precision:
        raise ValueError(f"subject {text!r} is no backend/precision, such as lean/bf16")
    if precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise ValueError(f"subject {text!r}: precision {precision!r} is none of {known}")
    return resolve_backend(backend), precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `run` reads."""
    add_model_argument(parser)
    add_sampling_arguments(parser, steps=50, one_scale=True, backend=False)
    add = parser.add_argument
    add("--subjects", nargs="+", default=["lean/fp32", "lean/bf16"], metavar="BACKEND/PRECISION")
    add("--samples", type=int, default=32, help="images, of all classes in turn")
    add_set_arguments(parser)
    add("--json", type=Path, help="write every figure and setting here")


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 0, or 130 if it was interrupted: then what was finished is printed."""
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
    model = str(arguments.model)
    report = new_report(
        "parity", describe(engine.device), {"model": model, **sampling_options(arguments)}
    )
    report["rows"] = compare(engine, labels, subjects, model=model, sets=sets, **options)
    report["complete"] = not any(row["interrupted"] for row in report["rows"])
    show(report_tables(report))
    write(report, arguments.json)
    return 0 if report["complete"] else INTERRUPTED
