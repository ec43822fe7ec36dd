"""``dit-generate``: class labels in, pictures out."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dit_engine._version import __version__
from dit_engine.cli.errors import run_command

if TYPE_CHECKING:
    from dit_engine.engine import Engine, Generation, Progress


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: generate(arguments))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dit-generate",
        description="Make images from class labels with a Diffusion Transformer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--version", action="version", version=f"%(prog)s {__version__}")
    add("--model", default="builtin", help="file, directory, hub id, or 'builtin'")
    add("--vae", help="another VAE: file, directory or hub id")
    add("--numerics", help="official or diffusers (what the model was made for, unless given)")
    add("--num-heads", type=int, help="for bare weight files of an unpublished width")
    add("--check-finite", action="store_true", help="look for NaN in every weight")
    add("--labels", nargs="+", metavar="LABEL", help="class names or numbers, one image each")
    add("--list-labels", action="store_true", help="print the model's classes and stop")
    add("-o", "--output", type=Path, default=Path("sheet.png"),
        help="a .png: one sheet; anything else: a directory for one file an image")  # fmt: skip
    add("--columns", type=int, help="of the sheet; about square unless given")
    add("--steps", type=int, help="1 to 1000; the sampler's usual count unless given")
    add("--sampler", default="ddpm", help="ddpm, ddim or dpm++")
    add("--eta", type=float, default=0.0, help="ddim: 0 deterministic, 1 as noisy as ddpm")
    add("--guidance-scale", type=float, nargs="+", default=[4.0], metavar="SCALE",
        help="one, or one an image; 1 is none")  # fmt: skip
    add("--guidance-channels", type=_channels, default=3, metavar="COUNT",
        help="latent channels that are guided, or 'all'")  # fmt: skip
    add("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="noise levels between which guidance is on")  # fmt: skip
    add("--seed", type=int, help="image i is made from seed + i; random unless given")
    add("--seeds", type=int, nargs="+", metavar="SEED", help="one an image")
    add("--noise", default="per-image", help="per-image or official (as the reference draws)")
    add("--latents", type=Path, help=".safetensors, .npy: latents to start from (N,C,S,S)")
    add("--step-noise", type=Path, help="likewise: the noise of every step (steps,N,C,S,S)")
    add("--backend", default="auto", help="auto, eager or compile")
    add("--precision", default="fp32", help="fp32, bf16 or fp16")
    add("--device", help="cpu, cuda, …; CUDA where there is one unless given")
    add("--max-batch-size", type=int, default=32, help="more images are made in several batches")
    add("--quiet", action="store_true", help="no progress bar, nothing but errors")
    return parser


def _channels(text: str) -> int | None:
    return None if text == "all" else int(text)


def generate(arguments: argparse.Namespace) -> int:
    from dit_engine.cli.pictures import check_writable, save_latents, save_pictures

    if arguments.list_labels:
        return list_labels(arguments)
    if not arguments.labels:
        raise ValueError("--labels is missing: give class names or numbers (see --list-labels)")
    check_writable(arguments.output)
    engine = load_engine(arguments)
    began = time.perf_counter()
    result = run_with_progress(engine, arguments)
    seconds = time.perf_counter() - began
    if engine.vae is None:
        written = save_latents(result, arguments.output)
    else:
        written = save_pictures(result, arguments.output, engine.label_names, arguments.columns)
    if not arguments.quiet:
        kind = "latents" if engine.vae is None else "images"
        n = len(result)
        print(f"{n} {kind} in {seconds:.1f} s ({n / seconds:.2f} a second) → {written}")
    return 0


def load_engine(arguments: argparse.Namespace) -> Engine:
    from dit_engine.engine import Engine

    return Engine.from_pretrained(
        arguments.model,
        vae=arguments.vae,
        numerics=arguments.numerics,
        num_heads=arguments.num_heads,
        check_finite=arguments.check_finite,
        device=arguments.device,
        max_batch_size=arguments.max_batch_size,
    )


def list_labels(arguments: argparse.Namespace) -> int:
    engine = load_engine(arguments)
    if engine.label_names is None:
        print(f"{arguments.model} has no label names; numbers 0 to {engine.config.num_classes - 1}")
    for number, name in enumerate(engine.label_names or ()):
        print(f"{number:4d}  {name}")
    return 0


def run_with_progress(engine: Engine, arguments: argparse.Namespace) -> Generation:
    """`Engine.generate` with a bar that counts image-steps over all batches."""
    from tqdm import tqdm

    from dit_engine.cli.pictures import read_tensor

    scales = arguments.guidance_scale
    bar = tqdm(disable=arguments.quiet, unit="step", desc="sampling", file=sys.stderr)

    def advance(progress: Progress) -> None:
        bar.total = progress.steps * progress.total
        bar.update(progress.count)

    with bar, warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: tqdm.write(f"note: {message}", sys.stderr)
        return engine.generate(
            arguments.labels,
            steps=arguments.steps,
            sampler=arguments.sampler,
            eta=arguments.eta,
            guidance_scale=scales[0] if len(scales) == 1 else scales,
            guidance_channels=arguments.guidance_channels,
            guidance_interval=arguments.guidance_interval,
            seed=arguments.seed,
            seeds=arguments.seeds,
            noise=arguments.noise,
            latents=read_tensor(arguments.latents),
            step_noise=read_tensor(arguments.step_noise),
            backend=arguments.backend,
            precision=arguments.precision,
            callback=advance,
        )


if __name__ == "__main__":
    sys.exit(main())
