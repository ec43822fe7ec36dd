"""``dit-generate``: class labels in, pictures out."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_engine.cli.arguments import (
    Parser,
    add_model_argument,
    add_sampling_arguments,
    sampling_options,
)
from dit_engine.cli.destination import check_destination, output_kind
from dit_engine.cli.errors import run_command

if TYPE_CHECKING:
    from dit_engine.engine import Engine, Generation, Progress


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: generate(arguments), arguments.quiet)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("dit-generate", "Make images from class labels with a Diffusion Transformer.")
    add_model_argument(parser)
    add = parser.add_argument
    add("--vae", help="another VAE: file, directory or hub id")
    add("--numerics", help="official or diffusers (what the model was made for, unless given)")
    add("--num-heads", type=int, help="for bare weight files of an unpublished width")
    add("--check-finite", action="store_true", help="look for NaN in every weight")
    add("--labels", nargs="+", metavar="LABEL", help="class names or numbers, one image each")
    add("--list-labels", action="store_true", help="print the model's classes and stop")
    add("-o", "--output", type=Path, default=Path("sheet.png"),
        help="a .png: all images on one sheet; a .npy: uint8 images (N, H, W, 3); "
        "a .safetensors: latents (N, C, S, S), not decoded; "
        "any other name: a directory for one .png an image")  # fmt: skip
    add("--columns", type=int, help="of the sheet; about square unless given")
    add_sampling_arguments(parser)
    add("--seed", type=int, help="image i is made from seed + i; random unless given")
    add("--seeds", type=int, nargs="+", metavar="SEED", help="one an image")
    add("--noise", default="per-image", help="per-image or official (as the reference draws)")
    add("--latents", type=Path, help=".safetensors, .npy: latents to start from (N, C, S, S)")
    add("--step-noise", type=Path, help="likewise: the noise of every step (steps, N, C, S, S)")
    add("--device", help="cpu, cuda, …; CUDA where there is one unless given")
    add("--max-batch-size", type=int, default=32, help="more images are made in several batches")
    add("--threads", type=int, help="of the CPU; torch's own choice unless given")
    add("--quiet", action="store_true", help="no progress bar, no notes, nothing but errors")
    return parser


def generate(arguments: argparse.Namespace) -> int:
    if arguments.list_labels:
        return list_labels(arguments)
    if not arguments.labels:
        raise ValueError("--labels is missing: give class names or numbers (see --list-labels)")
    if arguments.columns is not None and arguments.columns < 1:
        raise ValueError(f"columns {arguments.columns} is not a positive integer")
    if arguments.columns is not None and arguments.output.suffix.lower() != ".png":
        raise ValueError(f"--columns is of a sheet, a .png, and {arguments.output} is none")
    check_destination(arguments.output)

    from dit_engine.cli.pictures import save
    from dit_engine.cli.tensors import read_tensor

    output = output_kind(arguments.output)
    options = sampling_options(arguments) | {
        "seed": arguments.seed,
        "seeds": arguments.seeds,
        "noise": arguments.noise,
        "latents": read_tensor(arguments.latents),
        "step_noise": read_tensor(arguments.step_noise),
        "output": output,
    }
    engine = load_engine(arguments)
    if engine.vae is None and output != "latent":
        raise ValueError(
            f"this model has no VAE, so {arguments.output} cannot be made: "
            "use a .safetensors output for its latents, or give --vae"
        )
    began = time.perf_counter()
    result = run_with_progress(engine, arguments.labels, options, arguments.quiet)
    seconds = time.perf_counter() - began
    save(result, arguments.output, engine.label_names, arguments.columns)
    if not arguments.quiet:
        n = len(result)
        kind = "latents" if output == "latent" else "image" if n == 1 else "images"
        rate = f"{n / seconds:.2f} a second"
        print(f"{n} {kind} in {seconds:.1f} s ({rate}) → {arguments.output}")
    return 0


def load_engine(arguments: argparse.Namespace) -> Engine:
    from dit_engine.device import parse_device
    from dit_engine.engine import Engine

    return Engine.from_pretrained(
        arguments.model,
        vae=arguments.vae,
        numerics=arguments.numerics,
        num_heads=arguments.num_heads,
        check_finite=arguments.check_finite,
        device=parse_device(arguments.device),  # before the weights are read
        max_batch_size=arguments.max_batch_size,
        threads=arguments.threads,
    )


def list_labels(arguments: argparse.Namespace) -> int:
    engine = load_engine(arguments)
    if engine.label_names is None:
        print(f"{arguments.model} has no label names; numbers 0 to {engine.config.num_classes - 1}")
    for number, name in enumerate(engine.label_names or ()):
        print(f"{number:4d}  {name}")
    return 0


def run_with_progress(
    engine: Engine, labels: list[str], options: dict[str, Any], quiet: bool
) -> Generation:
    """`Engine.generate` with a bar that counts image-steps over all batches."""
    from tqdm import tqdm

    bar: tqdm[Any] | None = None

    def advance(progress: Progress) -> None:
        nonlocal bar
        done = progress.first * progress.steps + progress.step * progress.count
        if bar is None:  # not earlier: an invalid option would leave an empty bar behind
            total = progress.total * progress.steps
            bar = tqdm(
                total=total, initial=done, unit="image-step", desc="sampling", file=sys.stderr
            )
        bar.update(done - bar.n)  # back, when a batch is tried again in halves

    try:
        return engine.generate(labels, callback=None if quiet else advance, **options)
    finally:
        if bar is not None:
            bar.close()


if __name__ == "__main__":
    sys.exit(main())
