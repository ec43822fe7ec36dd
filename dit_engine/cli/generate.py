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

from dit_engine.console.output import (
    STDOUT,
    check_destination,
    destination,
    is_directory,
    output_kind,
)
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
from dit_engine.io.provenance import is_source
from dit_engine.labels import shared_names

if TYPE_CHECKING:
    from tqdm import tqdm

    from dit_engine.engine import Engine, Generation, Progress


@entry
def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if not arguments.list_labels and arguments.output != STDOUT:
        output_is_a_file()
    if arguments.like is None:
        return run_command(lambda: generate(arguments), arguments.quiet)
    return run_command(lambda: generate(like(arguments.like, argv)), arguments.quiet)


def like(path: Path, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the options recorded in an image in place of the defaults."""
    from dit_engine.cli.like import given_model, given_vae, recorded_options

    parser, options = build_parser(), recorded_options(path)
    model, vae = options.pop("model"), options.pop("vae", None)
    parser.set_defaults(**options, model=None)
    arguments = parser.parse_args(argv)
    parser.set_defaults(model=given_model(path, model, arguments.model))
    # Recorded options of a model, a VAE, a sheet or a sampler do not apply to another one.
    others: set[str] = set()
    if another := arguments.model is not None and not is_source(arguments.model, model):
        others |= {"numerics", "num_heads", "prediction", "diffusion"}
    if not given_vae(path, vae, arguments.vae, another):
        others |= {"vae_scaling_factor", "vae_shift_factor", "vae_groups"}
    if arguments.prediction != options.get("prediction"):
        others |= {"diffusion"}
    if not is_sheet(arguments.output):
        others |= {"columns"}
    replaced: dict[str, Any] = dict.fromkeys(others & options.keys())
    if another and any(options[name] for name in replaced):
        warnings.warn(
            f"{path} was made with another model, {model[:200]!r}: these settings of it are not "
            f"used: {', '.join(sorted(replaced))}",
            stacklevel=2,
        )
    if arguments.sampler != options.get("sampler"):  # the other one has its own usual values
        replaced |= {"steps": None, "spacing": None, "eta": 0.0}
    parser.set_defaults(**replaced)
    arguments = parser.parse_args(argv)
    given = build_parser().parse_args(argv)
    if given.seed is not None or given.seeds is not None:
        arguments.seed, arguments.seeds = given.seed, given.seeds
    if given.all_labels:
        arguments.labels = None
    n = len(arguments.labels or ()) * arguments.repeat
    if given.all_labels or given.labels or given.repeat != 1:
        arguments.only = 0 if n == 1 else None
        told = arguments.seeds if given.seeds is None else None
        if isinstance(told, list) and (given.all_labels or len(told) != n):
            raise ValueError(
                f"--like {path} records {len(told)} seeds, which do not fit these labels: give "
                "--seed, or --seeds"
            )
    return arguments


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("dit-generate", "Make images from class labels with a Diffusion Transformer.")
    add_model_argument(parser)
    add = parser.add_argument
    add_loading_arguments(parser)
    add("--check-finite", action="store_true", help="look for NaN in every weight")
    add(
        "--record-paths",
        action="store_true",
        help="record the whole paths of the model and the VAE in the output, not only their names",
    )
    add("--like", type=Path, metavar="PNG",
        help="make an image or a sheet of dit-generate again, with the --model and --vae that are "
        "given; other options replace what is recorded in it")  # fmt: skip
    add("--labels", nargs="+", metavar="LABEL", help="class names or numbers, one image each")
    add("--all-labels", action="store_true", help="every class of the model")
    add("--repeat", type=int, default=1, metavar="COUNT", help="images of each label, in turn")
    add("--list-labels", action="store_true", help="print the model's classes and stop")
    add("-o", "--output", type=destination, default=Path("sheet.png"),
        help="a .png: all images on one sheet; -: the same, to standard output; "
        "a .npy: uint8 images (N, H, W, 3); a .safetensors: latents (N, C, S, S), not decoded; "
        "any other name: a directory for one .png an image, where images that are there "
        "already are not made again")  # fmt: skip
    add("--overwrite", action="store_true",
        help="of a directory: make all images again; of a file: replace it without a "
        "note")  # fmt: skip
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
    parser.set_defaults(bare=False, diffusion=None, only=None)
    return parser


def generate(arguments: argparse.Namespace) -> int:
    if arguments.list_labels:
        return list_labels(arguments)
    if bool(arguments.labels) == arguments.all_labels:
        raise ValueError(
            "give --labels, class names or numbers (see --list-labels), or --all-labels"
        )
    if arguments.repeat < 1:
        raise ValueError(f"repeat {arguments.repeat} is not a positive integer")
    if arguments.columns is not None and arguments.columns < 1:
        raise ValueError(f"columns {arguments.columns} is not a positive integer")
    if arguments.columns is not None and not is_sheet(arguments.output):
        raise ValueError(f"--columns is of a sheet, a .png, and {arguments.output} is none")
    check_destination(arguments.output, arguments.overwrite)

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
    told, found = arguments.diffusion, engine.config.diffusion.record()
    if told not in (None, found):
        raise ValueError(
            f"{arguments.like} was made with diffusion {told or 'as published'}, and "
            f"{arguments.model} has {found or 'the published one'}: it would be another image"
        )
    quiet = arguments.quiet
    if engine.vae is None and output != "latent":
        raise ValueError(
            f"this model has no VAE, so {arguments.output} cannot be made: "
            "use a .safetensors output for its latents, or give --vae"
        )
    labels = arguments.repeat * (arguments.labels or [*range(engine.config.num_classes)])
    began = time.perf_counter()
    with closing(SamplingBar(engine, quiet)) as bar:
        if is_directory(arguments.output):
            made, notes = make_series(bar, labels, options, arguments)
        else:
            result = bar.generate(labels, **options)
            save(result, arguments.output, arguments.columns, arguments.only)
            made, notes = 1 if output == "pil" and arguments.only is not None else len(result), ""
    seconds = time.perf_counter() - began
    if not quiet:
        kind = "latents" if output == "latent" else "image" if made == 1 else "images"
        rate = f" in {seconds:.1f} s ({made / seconds:.2f} a second)" if made else ""
        place = "standard output" if arguments.output == STDOUT else arguments.output
        news = sys.stderr if arguments.output == STDOUT else sys.stdout
        say(f"{made} {kind}{rate} → {printable(place)}{notes}", news)
    return 0


def is_sheet(output: Path) -> bool:
    return output == STDOUT or output.suffix.lower() == ".png"


def make_series(
    bar: SamplingBar,
    labels: list[int | str],
    options: dict[str, Any],
    arguments: argparse.Namespace,
) -> tuple[int, str]:
    """A directory of images → how many were made, and what is to be said beside it."""
    from dit_engine.cli.series import Series

    series = Series.of(bar.engine, labels, options, arguments.output, arguments.overwrite)
    if series.others and series.missing:
        note = f"{series.directory} holds other PNGs ({series.others}), which stay"
        if arguments.seed is None and arguments.seeds is None:
            note += "; give the --seed of an earlier call to continue that call instead"
        warnings.warn(note, stacklevel=1)
    series.make(bar.generate)
    made, notes = len(series.missing), ""
    if made < len(series.whole):
        notes = f"; {len(series.whole) - made} of {len(series.whole)} were there"
    if series.others:
        notes += f"; the directory holds {series.others} other images"
    return made, notes


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
        """first, total: where the labels are a part of more, how many went before, of how many."""

        def advance(progress: Progress) -> None:
            done = (first + progress.first) * progress.steps + progress.step * progress.count
            bar = self._shown((total or progress.total) * progress.steps, done)
            bar.update(done - bar.n)  # back, when a batch is tried again in halves

        return self.engine.generate(labels, callback=None if self.quiet else advance, **options)

    def _shown(self, total: int, done: int) -> tqdm[Any]:
        from dit_engine.console.bars import Bar

        if self._bar is None:  # not earlier: an invalid option would leave an empty bar behind
            self._bar = Bar(
                total=total, initial=done, unit="image-step", desc="sampling", file=sys.stderr
            )
        return self._bar

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


if __name__ == "__main__":
    sys.exit(main())
