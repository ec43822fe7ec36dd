"""A directory of images, written batch by batch: what is there already is not made again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_engine.arguments import shown
from dit_engine.console.output import file_name
from dit_engine.io.files import atomic_path
from dit_engine.io.images import open_image
from dit_engine.io.provenance import same_source
from dit_engine.labels import resolve_labels
from dit_engine.metadata import as_read, image_record, png_text, record_in
from dit_engine.settings import resolve_seeds

if TYPE_CHECKING:
    from dit_engine.engine import Engine, Generation

Generate = Callable[..., "Generation"]


@dataclass(frozen=True)
class Series:
    """The images of one call, and which of them are to be made.

    Attributes:
        seeds: one an image, also where none is used.
        whole: what the call would give, without images.
        missing: places of the images that are not there.
    """

    engine: Engine
    directory: Path
    options: dict[str, Any]
    seeds: list[int]
    whole: Generation
    missing: list[int]

    @classmethod
    def of(
        cls,
        engine: Engine,
        labels: Sequence[int | str],
        options: dict[str, Any],
        directory: Path,
        overwrite: bool,
    ) -> Series:
        """Raises ValueError where a file of another call has the name of one of these images,
        unless ``overwrite``."""
        numbers = resolve_labels(labels, engine.config.num_classes, engine.label_names)
        seeds = resolve_seeds(options["seed"], options["seeds"], len(numbers), options["noise"])
        settings = {k: v for k, v in options.items() if k not in ("seed", "seeds")}
        whole = engine.planned(numbers, seeds, **settings)
        series = cls(engine, directory, options, seeds, whole, [])
        missing = [i for i in range(len(numbers)) if overwrite or not series._is_there(i)]
        return replace(series, missing=missing)

    @property
    def as_a_whole(self) -> bool:
        """Whether noise is drawn, or given, for all images at once."""
        given = (self.options["latents"], self.options["step_noise"])
        return self.options["noise"] == "official" or any(noise is not None for noise in given)

    @property
    def others(self) -> int:
        """How many other PNGs the directory holds."""
        names = {self._name(i) for i in range(len(self.whole))}
        return sum(path.name not in names for path in self.directory.glob("*.png"))

    def make(self, generate: Generate) -> None:
        """Make the missing images with ``generate(labels, first=…, total=…, **options)``, whose
        images are places first, first + 1, … of the total; each batch is written before the next
        is begun."""
        first, parts = 0, list(self._parts())
        total = sum(map(len, parts))
        for part in parts:
            result = generate(
                [self.whole.labels[i] for i in part], first=first, total=total, **self._of(part)
            )
            self.directory.mkdir(parents=True, exist_ok=True)
            for i, image in zip(part, result.images, strict=True):
                info = png_text(image_record(self.whole, i))
                with atomic_path(self.directory / self._name(i)) as partial:
                    image.save(partial, "PNG", pnginfo=info)
            first += len(part)

    def _parts(self) -> Iterator[list[int]]:
        if self.as_a_whole and self.missing:
            yield list(range(len(self.whole)))
            return
        size = self.engine.max_batch_size
        for first in range(0, len(self.missing), size):
            yield self.missing[first : first + size]

    def _of(self, part: list[int]) -> dict[str, Any]:
        """The options for images ``part`` alone."""
        if self.as_a_whole:
            return self.options
        scale, n = self.options["guidance_scale"], len(self.whole)
        if isinstance(scale, Sequence) and len(scale) == n:
            scale = [scale[i] for i in part]
        seeds = [self.seeds[i] for i in part]
        return self.options | {"guidance_scale": scale, "seed": None, "seeds": seeds}

    def _name(self, i: int) -> str:
        names, whole = self.engine.label_names, self.whole
        label = whole.labels[i]
        seed = None if whole.seeds is None else whole.seeds[i]
        return file_name(i, label, names[label] if names else None, seed)

    def _is_there(self, i: int) -> bool:
        path = self.directory / self._name(i)
        if not path.exists():
            return False
        expected = as_read(image_record(self.whole, i))
        found = _record_of(path)
        for name in expected.keys() & {"model", "vae"}:  # records may have a path or only its name
            told = None if found is None else found.get(name)
            if isinstance(told, str) and same_source(told, expected[name]):
                expected[name] = told
        if found == expected:
            return True
        if found is None:
            difference = "is no image of this engine"
        else:
            names = [name for name in expected if found.get(name, ...) != expected[name]]
            name = (names or sorted(found.keys() - expected.keys()))[0]
            there = f"{shown(name)[1:-1]} {shown(found.get(name))}"
            difference = f"has {there} and not {expected.get(name)!r}"
        raise ValueError(f"{path} {difference}: give another directory, or --overwrite")


def _record_of(path: Path) -> dict[str, Any] | None:
    """What a PNG says of its making; None for anything that says nothing."""
    try:
        with open_image(path) as image:
            image.load()  # a file that breaks off is not there
            return record_in(image)
    except ValueError:
        return None
