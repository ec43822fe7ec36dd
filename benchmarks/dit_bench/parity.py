"""Paired sampling: how far a backend's images are from those of the reference, noise being equal.

``python -m dit_bench.parity --subjects lean/bf16 lean/int8`` makes the same images (labels, seeds,
and with them every draw) by eager float32 and by each subject, a backend and a precision, and
reports the error of the latents after every step and of the final images. Paired, a difference
says what the arithmetic costs; two Fréchet distances would mostly differ by their samples.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dit_bench.hardware import describe_hardware
from dit_bench.quality import write_report
from dit_engine.backends import PRECISIONS, resolve_backend
from dit_engine.cli.arguments import (
    Parser,
    add_model_argument,
    add_sampling_arguments,
    sampling_options,
)
from dit_engine.cli.destination import check_file
from dit_engine.cli.errors import run_command

if TYPE_CHECKING:
    from dit_engine.engine import Engine, Progress

REFERENCE = ("eager", "fp32")
PEAK = 1.0  # of images in [0, 1]


def trajectory(engine: Engine, labels: Sequence[int], **settings: Any) -> tuple[Tensor, dict]:
    """Latents after every step, (steps, N, C, S, S) on the CPU, and the engine's record."""
    batches: dict[int, list[Tensor]] = {}

    def keep(progress: Progress) -> None:
        batches.setdefault(progress.first, []).append(progress.latents.float().cpu().clone())

    result = engine.generate(labels, output="latent", callback=keep, **settings)
    parts = [torch.stack(steps) for _, steps in sorted(batches.items())]
    return torch.cat(parts, dim=1), result.settings


def relative_errors(found: Tensor, reference: Tensor) -> np.ndarray:
    """(steps, N) root mean square of the difference over that of the reference, image by image."""
    difference = (found - reference).double().flatten(2).norm(dim=2)
    return (difference / reference.double().flatten(2).norm(dim=2)).numpy()


def psnr(found: Tensor, reference: Tensor) -> np.ndarray:
    """(N,) peak signal-to-noise ratio in dB of images (N, 3, H, W) in [0, 1]; inf where equal."""
    squared = (found - reference).double().square().flatten(1).mean(1).numpy()
    with np.errstate(divide="ignore"):
        return 10 * np.log10(PEAK**2 / squared)


def compare(
    engine: Engine, labels: Sequence[int], subjects: Sequence[tuple[str, str]], **settings: Any
) -> dict[str, Any]:
    """Errors of every subject (backend, precision) against the reference, N beside them.

    Images are decoded by the reference's VAE in float32: what differs is the transformer.
    """
    backend, precision = REFERENCE
    reference, record = trajectory(engine, labels, backend=backend, precision=precision, **settings)
    images = _decode(engine, reference[-1])
    rows = []
    for backend, precision in subjects:
        found, _ = trajectory(engine, labels, backend=backend, precision=precision, **settings)
        errors = relative_errors(found, reference)  # (steps, N)
        row: dict[str, Any] = {
            "backend": backend,
            "precision": precision,
            "latent_error_by_step": errors.mean(axis=1).tolist(),
            "final_latent_error": {
                "mean": float(errors[-1].mean()),
                "max": float(errors[-1].max()),
            },
        }
        if images is not None:
            decoded = _decode(engine, found[-1])
            assert decoded is not None
            ratio = psnr(decoded, images)
            row["psnr_db"] = {"median": float(np.median(ratio)), "min": float(ratio.min())}
        rows.append(row)
    return {"n": len(labels), "settings": record, "subjects": rows}


def _decode(engine: Engine, latents: Tensor) -> Tensor | None:
    if engine.vae is None:
        return None
    vae = copy.deepcopy(engine.vae).float()  # the stored weights may be half as wide
    z = (latents / vae.config.scaling_factor).to(vae.post_quant_conv.weight.device)
    with torch.inference_mode():
        parts = [vae.decode(part).cpu() for part in z.split(8)]
    return (torch.cat(parts).clamp(-1, 1) + 1) / 2


def format_report(report: dict[str, Any]) -> str:
    """A line a subject, N first."""
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
    parser = Parser("python -m dit_bench.parity", "Backends against eager float32, noise equal.")
    add_model_argument(parser)
    add_sampling_arguments(parser, steps=50, one_scale=True, backend=False)
    add = parser.add_argument
    add("--subjects", nargs="+", default=["lean/fp32", "lean/bf16"], metavar="BACKEND/PRECISION")
    add("--samples", type=int, default=32, help="images, of all classes in turn")
    add("--json", type=Path, help="write every figure and setting here")
    return parser


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
        options = sampling_options(arguments) | {"seed": 0}
        report = {"model": str(arguments.model), **compare(engine, labels, subjects, **options)}
        report["hardware"] = describe_hardware()
        print(format_report(report))
        if arguments.json is not None:
            write_report(report, arguments.json)
        return 0

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
