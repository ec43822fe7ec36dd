"""``dit-generate``: class labels in, pictures out."""

from __future__ import annotations

if __name__ == "__main__":  # before anything else is imported
    from dit_engine.first import leave_out_of_path

    leave_out_of_path()

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_engine.console import output as outputs
from dit_engine.console.output import STDOUT
from dit_engine.console.parser import (
    Parser,
    add_loading_arguments,
    add_model_argument,
    add_sampling_arguments,
    loading_options,
    sampling_options,
)
from dit_engine.console.run import entry, output_is_a_file, run_command
from dit_engine.io.printable import printable, say
from dit_engine.labels import shared_names

if TYPE_CHECKING:
    from tqdm import tqdm

    from dit_engine.engine import Engine, Generation, Progress


@entry
def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if not arguments.list_labels and arguments.output != STDOUT:
        output_is_a_file()

    def command() -> int:
        if arguments.like is None:
            return generate(arguments)
        from dit_engine.cli.like import arguments_like

        return generate(arguments_like(arguments.like, argv, build_parser))

    return run_command(command, arguments.quiet)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("dit-generate", "Make images from class labels with a Diffusion Transformer.")
    add_model_argument(parser)
    add = parser.add_argument
    add_loading_arguments(parser)
    add("--check-finite", action="store_true", help="look for NaN in every weight")
    add("--record-paths", action="store_true", help="record the whole paths of the model and the "
        "VAE in the output, not only their names")  # fmt: skip
    add("--like", type=Path, metavar="PNG",
        help="make an image or a sheet of dit-generate again, with the --model and --vae that are "
        "given; other options replace what is recorded in it")  # fmt: skip
    add("--labels", nargs="+", metavar="LABEL", help="class names or numbers, one per image")
    add("--all-labels", action="store_true", help="every class of the model")
    add("--repeat", type=int, default=1, metavar="COUNT", help="images of each label, in turn")
    add("--list-labels", action="store_true", help="print the model's classes and stop")
    add("-o", "--output", type=outputs.destination, default=Path("sheet.png"),
        help="a .png: all images on one sheet; -: the same, to standard output; "
        "a .npy: uint8 images (N, H, W, 3); a .safetensors: latents (N, C, S, S), not decoded; "
        "any other name: a directory with one .png per image, where images that are there "
        "already are not made again")  # fmt: skip
    add("--overwrite", action="store_true",
        help="for a directory: make all images again; for a file: replace it without a "
        "note")  # fmt: skip
    add("--columns", type=int, help="of the sheet; about square unless given")
    add_sampling_arguments(parser)
    add("--seed", type=int, help="image i is made from seed + i; random unless given")
    add("--seeds", type=int, nargs="+", metavar="SEED", help="one per image")
    add("--noise", default="per-image", help="per-image or official (as the reference draws)")
    add("--latents", type=Path, help=".safetensors, .npy: latents to start from (N, C, S, S)")
    add("--step-noise", type=Path, help="the same for the noise of every step (steps, N, C, S, S)")
    add("--device", help="cpu, cuda, …; CUDA where there is one unless given")
    add("--max-batch-size", type=int, default=32, help="more images are made in several batches")
    add("--threads", type=int, help="of the CPU; torch's own choice unless given")
    add("--quiet", action="store_true", help="no progress bar, no notes, nothing but errors")
    parser.set_defaults(diffusion=None, only=None)  # --like sets these, which are no options
    return parser


def generate(arguments: argparse.Namespace) -> int:
    if arguments.list_labels:
        return list_labels(arguments)
    output = arguments.output
    if bool(arguments.labels) == arguments.all_labels:
        raise ValueError(
            "give --labels, class names or numbers (see --list-labels), or --all-labels"
        )
    for name in ("repeat", "columns"):
        if (number := getattr(arguments, name)) is not None and number < 1:
            raise ValueError(f"{name} {number} is not a positive integer")
    if arguments.columns is not None and not outputs.is_sheet(output):
        raise ValueError(f"--columns is of a sheet, a .png, and {output} is none")
    outputs.check_destination(output, arguments.overwrite)

    from dit_engine.cli.tensors import read_tensor
    from dit_engine.results import save

    kind = outputs.output_kind(output)
    options = sampling_options(arguments) | {
        "seed": arguments.seed,
        "seeds": arguments.seeds,
        "noise": arguments.noise,
        "latents": read_tensor(arguments.latents),
        "step_noise": read_tensor(arguments.step_noise),
        "output": kind,
    }
    engine = load_engine(arguments)
    told, found = arguments.diffusion, engine.config.diffusion.record()
    if told not in (None, found):
        raise ValueError(
            f"{arguments.like} was made with diffusion {told or 'as published'}, and "
            f"{arguments.model} has {found or 'the published one'}: it would be another image"
        )
    if engine.vae is None and kind != "latent":
        raise ValueError(
            f"this model has no VAE, so {output} cannot be made: "
            "use a .safetensors output for its latents, or give --vae"
        )
    labels = arguments.repeat * (arguments.labels or [*range(engine.config.num_classes)])
    began, notes = time.perf_counter(), ""
    with closing(SamplingBar(engine, arguments.quiet)) as bar:
        if outputs.is_directory(output):
            from dit_engine.cli.series import make_series

            made, notes = make_series(bar.generate, engine, labels, options, arguments)
        else:
            result = bar.generate(labels, **options)
            save(result, output, arguments.columns, arguments.only)
            made = 1 if kind == "pil" and arguments.only is not None else len(result)
    seconds = time.perf_counter() - began
    if not arguments.quiet:
        what = "latents" if kind == "latent" else "image" if made == 1 else "images"
        rate = f" in {seconds:.1f} s ({made / seconds:.2f} a second)" if made else ""
        place = "standard output" if output == STDOUT else output
        news = sys.stderr if output == STDOUT else sys.stdout
        say(f"{made} {what}{rate} → {printable(place)}{notes}", news)
    return 0


def load_engine(arguments: argparse.Namespace) -> Engine:
    from dit_engine.engine import Engine
    from dit_engine.runtime import parse_device

    return Engine.from_pretrained(
        arguments.model,
        **loading_options(arguments),
        check_finite=arguments.check_finite,
        device=parse_device(arguments.device),  # before the weights are read
        max_batch_size=arguments.max_batch_size,
        threads=arguments.threads,
        record_paths=arguments.record_paths,
    )


def list_labels(arguments: argparse.Namespace) -> int:
    engine = load_engine(arguments)
    if engine.label_names is None:
        last = engine.config.num_classes - 1
        say(f"{printable(arguments.model)} has no label names; numbers 0 to {last}")
    for number, name in enumerate(engine.label_names or ()):
        print(f"{number:4d}  {printable(name)}")
    if shared := shared_names(engine.label_names or ()):
        told = (f"{name} ({', '.join(map(str, owners))})" for name, owners in shared.items())
        warnings.warn(f"several classes have these names, so give numbers: {'; '.join(told)}",
                      stacklevel=2)  # fmt: skip
    return 0


class SamplingBar:
    """`Engine.generate` with a bar that counts image-steps over all batches of all calls."""

    def __init__(self, engine: Engine, quiet: bool) -> None:
        self.engine, self.quiet = engine, quiet
        self._bar: tqdm[Any] | None = None

    def generate(
        self,
        labels: Sequence[int | str],
        *,
        first: int = 0,
        total: int | None = None,
        **options: Any,
    ) -> Generation:
        """Generate some of ``total`` images, of which ``first`` were made before."""

        def advance(progress: Progress) -> None:
            done = (first + progress.first) * progress.steps + progress.step * progress.count
            if self._bar is None:  # not earlier: an invalid option would leave an empty bar
                from dit_engine.console.bars import Bar

                all_steps = (total or progress.total) * progress.steps
                self._bar = Bar(total=all_steps, initial=done, unit="image-step", desc="sampling",
                                file=sys.stderr)  # fmt: skip
            self._bar.update(done - self._bar.n)  # back, when a batch is tried again in halves

        return self.engine.generate(labels, callback=None if self.quiet else advance, **options)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


if __name__ == "__main__":
    sys.exit(main())
