"""A directory of images, written batch by batch; images that exist are not made again."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_engine.arguments import shown
from dit_engine.console.output import file_name
from dit_engine.io.files import atomic_path
from dit_engine.io.images import open_image
from dit_engine.io.provenance import same_source
from dit_engine.results import as_read, image_record, png_text, record_in

if TYPE_CHECKING:
    from dit_engine.engine import Engine, Generation


def make_series(
    generate: Callable[..., Generation],
    engine: Engine,
    labels: Sequence[int | str],
    options: dict[str, Any],
    arguments: argparse.Namespace,
) -> tuple[int, str]:
    """Make the images that the directory lacks; returns how many, and what to print after it.

    generate: called for each batch, as ``generate(labels, first=…, total=…, **options)`` for images
    first, first + 1, … of the total. Each batch is written before the next begins.

    Raises ValueError where a file of another call has the name of one of these images, unless
    ``arguments.overwrite``.
    """
    series = Series(engine, labels, options, arguments.output)
    whole, paths, directory = series.whole, series.paths, arguments.output
    missing = [i for i in range(len(paths)) if arguments.overwrite or not series.is_there(i)]
    others = len({*directory.glob("*.png")} - {*paths})
    if others and missing:
        note = f"{directory} holds other PNGs ({others}), which stay"
        if arguments.seed is None and arguments.seeds is None:
            note += "; give the --seed of an earlier call to continue that call instead"
        warnings.warn(note, stacklevel=1)
    first, parts = 0, list(series.parts(missing))
    total = sum(len(places) for places, _ in parts)
    for places, own in parts:
        result = generate([whole.labels[i] for i in places], first=first, total=total, **own)
        directory.mkdir(parents=True, exist_ok=True)
        for i, image in zip(places, result.images, strict=True):
            with atomic_path(paths[i]) as partial:
                image.save(partial, "PNG", pnginfo=png_text(image_record(whole, i)))
        first += len(places)
    notes = ""
    if len(missing) < len(paths):
        notes = f"; {len(paths) - len(missing)} of {len(paths)} were there"
    if others:
        notes += f"; the directory holds {others} other images"
    return len(missing), notes


class Series:
    """The images of one call. whole: what the call would give, without images."""

    def __init__(
        self, engine: Engine, labels: Sequence[int | str], options: dict[str, Any], directory: Path
    ) -> None:
        self.options, self.batch = options, engine.max_batch_size
        plan = engine.plan(labels, **options)
        self.seeds, self.whole = plan.seeds, plan.result(None)
        names, seeds = engine.label_names, self.whole.seeds
        self.paths = [
            directory
            / file_name(i, label, names[label] if names else None, seeds[i] if seeds else None)
            for i, label in enumerate(self.whole.labels)
        ]

    def parts(self, missing: list[int]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """The places of each batch, with the options of `Engine.generate` for it alone."""
        given = (self.options["latents"], self.options["step_noise"])
        if self.options["noise"] == "official" or any(noise is not None for noise in given):
            # Noise is drawn or given for all images at once, so all are made again.
            own = {"seed": self.seeds[0], "seeds": None}
            if self.options["noise"] != "official":
                own = {"seed": None, "seeds": self.seeds}
            if missing:
                yield list(range(len(self.whole))), self.options | own
            return
        scale = self.options["guidance_scale"]
        each = isinstance(scale, Sequence) and len(scale) == len(self.whole)
        for first in range(0, len(missing), self.batch):
            places = missing[first : first + self.batch]
            own = {"seed": None, "seeds": [self.seeds[i] for i in places]}
            if each:
                own["guidance_scale"] = [scale[i] for i in places]
            yield places, self.options | own

    def is_there(self, i: int) -> bool:
        path = self.paths[i]
        if not path.exists():
            return False
        expected, found = as_read(image_record(self.whole, i)), _record_of(path)
        if found is None:
            raise ValueError(
                f"{path} is no image of this engine: give another directory, or --overwrite"
            )
        for name in expected.keys() & {"model", "vae"}:  # records may have a path or only its name
            told = found.get(name)
            if isinstance(told, str) and same_source(told, expected[name]):
                expected[name] = told
        if found == expected:
            return True
        names = [name for name in expected if found.get(name, ...) != expected[name]]
        name = (names or sorted(found.keys() - expected.keys()))[0]
        raise ValueError(
            f"{path} has {shown(name)[1:-1]} {shown(found.get(name))} and not "
            f"{expected.get(name)!r}: give another directory, or --overwrite"
        )


def _record_of(path: Path) -> dict[str, Any] | None:
    """The settings in a PNG; None for a file that holds none or is not whole."""
    try:
        with open_image(path) as image:
            image.load()  # a file that breaks off is not there
            return record_in(image)
    except ValueError:
        return None
