"""``dit-bench parity``: how far a backend's images are from the reference's, with equal noise.

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
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dit_bench.command import true_float32
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
from dit_engine.decode import LatentDecoder, to_uint8
from dit_engine.errors import NotFinite
from dit_engine.sampling.noise import resolve_seeds

if TYPE_CHECKING:
    from dit_engine.engine import Engine

REFERENCE = ("eager", "fp32")
PEAK = 1.0  # of images in [0, 1]


def relative_errors(found: Tensor, reference: Tensor) -> np.ndarray:
    """(steps, N): for each image, the norm of the difference divided by that of the reference."""
    difference = (found - reference).double().flatten(2).norm(dim=2)
    return (difference / reference.double().flatten(2).norm(dim=2)).numpy()


def psnr(found: Tensor, reference: Tensor) -> np.ndarray:
    """(N,) peak signal-to-noise ratio in dB of images (N, 3, H, W) in [0, 1]; inf if equal."""
    squared = (found - reference).double().square().flatten(1).mean(1).numpy()
    with np.errstate(divide="ignore"):
        return 10 * np.log10(PEAK**2 / squared)


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
    """Errors of every subject (backend, precision) against eager float32, with their N.

    All images are decoded by the VAE in float32, so that only the transformer differs.

    Args:
        model: what the rows call the model.
        sets: how the whole sets are compared; None does not compare them.
        seed: image i is made from seed + i; None chooses a random seed.
        quiet: no progress bars.
        check: called after every step, after every resample, and after every batch of a reference
            that is read here; it may raise KeyboardInterrupt.

    Raises ValueError for sets without images.
    """
    from dit_engine.console.bars import Bar

    if sets is not None:
        if engine.vae is None:
            raise ValueError(f"model {model!r} has no VAE; {sets.network.metric} is of images")
        sets = sets.with_moments(quiet, check)
    seeds = resolve_seeds(seed, None, len(labels), "per-image")
    decode = None if engine.vae is None else LatentDecoder(engine.vae, engine.device)
    runs, record = [REFERENCE, *subjects], {}
    gathered: list[dict[str, list[np.ndarray]]] = [defaultdict(list) for _ in runs]
    with Bar(total=len(labels) * len(runs), desc="sampling", unit="img", delay=2.0,
             disable=quiet) as bar:  # fmt: skip
        for start in range(0, len(labels), engine.max_batch_size):
            part = slice(start, start + engine.max_batch_size)
            reference = images = None
            for (backend, precision), found in zip(runs, gathered, strict=True):
                recorder = Recorder(check)
                try:
                    made = engine.generate(
                        labels[part], seeds=seeds[part], output="latent", callback=recorder,
                        backend=backend, precision=precision, **settings,
                    )  # fmt: skip
                    record = made.settings if reference is None else record
                except NotFinite:  # the error of a subject is what is measured
                    if reference is None:
                        raise
                latents = recorder.latents()
                reference = latents if reference is None else reference
                found["errors"].append(relative_errors(latents, reference))
                bar.update(latents.shape[1])
                if decode is None:
                    continue
                with torch.inference_mode():
                    decoded = decode(latents[-1].to(engine.device), "fp32").cpu()
                decoded = (decoded.clamp(-1, 1) + 1) / 2
                images = decoded if images is None else images
                found["psnr"].append(psnr(decoded, images))
                if sets is not None:
                    extracted = sets.network.extract(to_uint8(decoded * 2 - 1))
                    found["features"].append(extracted.pooled)
    eager, *others = gathered
    rows: list[Row] = []
    for (backend, precision), found in zip(subjects, others, strict=True):
        errors = np.concatenate(found["errors"], axis=1)  # (steps, N)
        last = {"mean": float(errors[-1].mean()), "max": float(errors[-1].max())}
        row: Row = {
            "section": "parity", "case": model, "contender": f"{backend} {precision}",
            "role": "subject", "status": "ok", "model": model, "backend": backend,
            "precision": precision, "n": len(labels), "settings": record,
            "latent_error_by_step": errors.mean(axis=1).tolist(), "final_latent_error": last,
        }  # fmt: skip
        if decode is not None:
            ratio = np.concatenate(found["psnr"])
            row["psnr_db"] = {
                "median": float(np.median(ratio)), "min": float(ratio.min()),
                "not_finite": int(np.isnan(ratio).sum()),  # images; equal ones have infinity
            }  # fmt: skip
        if sets is not None:
            ours, theirs = (np.concatenate(each["features"]) for each in (found, eager))
            compared = sets.compare(ours, theirs, quiet, check)
            row["sets"] = compared | {"features": sets.network.record}
        rows.append(row)
    return rows


def parse_subject(text: str) -> tuple[str, str]:
    """ "lean/int8" → ("lean", "int8"). Raises ValueError for any other form."""
    backend, _, precision = text.rpartition("/")
    if not backend or precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise ValueError(f"subject {text!r} is no backend/precision, such as lean/bf16, of {known}")
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


@true_float32()
def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
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
    report["complete"] = True
    show(report_tables(report))
    write(report, arguments.json)
    return 0
