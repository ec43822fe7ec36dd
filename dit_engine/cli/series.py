"""A directory of images, written batch by batch; images that exist are not made again."""

from __future__ import annotations

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


class Series:
    """The images of one call, and which of them have to be made.

    Attributes:
        whole: what the call would give, without images.
        missing: places of the images that are not in the directory.
        others: how many other PNGs the directory holds.
    """

    def __init__(
        self,
        engine: Engine,
        labels: Sequence[int | str],
        options: dict[str, Any],
        directory: Path,
        overwrite: bool,
    ) -> None:
        """Raises ValueError where a file of another call has the name of one of these images,
        unless ``overwrite``."""
        self.engine, self.directory, self.options = engine, directory, options
        plan = engine.plan(labels, **options)
        self.seeds, self.whole = plan.seeds, plan.result(None)
        self.paths = [self._path(i) for i in range(len(plan))]
        self.missing = [i for i in range(len(plan)) if overwrite or not self._is_there(i)]
        self.others = len({*directory.glob("*.png")} - {*self.paths})

    def make(self, generate: Callable[..., Generation]) -> None:
        """Make the missing images with ``generate(labels, first=…, total=…, **options)``, whose
        images are places first, first + 1, … of the total; each batch is written before the next
        begins."""
        first, parts = 0, list(self._parts())
        total = sum(len(places) for places, _ in parts)
        for places, options in parts:
            labels = [self.whole.labels[i] for i in places]
            result = generate(labels, first=first, total=total, **options)
            self.directory.mkdir(parents=True, exist_ok=True)
            for i, image in zip(places, result.images, strict=True):
                info = png_text(image_record(self.whole, i))
                with atomic_path(self.paths[i]) as partial:
                    image.save(partial, "PNG", pnginfo=info)
            first += len(places)

    def _parts(self) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """The places of each batch, with the options of `Engine.generate` for it alone."""
        given = (self.options["latents"], self.options["step_noise"])
        if self.options["noise"] == "official" or any(noise is not None for noise in given):
            # Noise is drawn or given for all images at once, so all are made again.
            own = {"seed": self.seeds[0], "seeds": None}
            if self.options["noise"] != "official":
                own = {"seed": None, "seeds": self.seeds}
            if self.missing:
                yield list(range(len(self.whole))), self.options | own
            return
        scale, size = self.options["guidance_scale"], self.engine.max_batch_size
        each = isinstance(scale, Sequence) and len(scale) == len(self.whole)
        for first in range(0, len(self.missing), size):
            places = self.missing[first : first + size]
            own = {"seed": None, "seeds": [self.seeds[i] for i in places]}
            if each:
                own["guidance_scale"] = [scale[i] for i in places]
            yield places, self.options | own

    def _path(self, i: int) -> Path:
        names, label, seeds = self.engine.label_names, self.whole.labels[i], self.whole.seeds
        name = names[label] if names else None
        return self.directory / file_name(i, label, name, None if seeds is None else seeds[i])

    def _is_there(self, i: int) -> bool:
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
