"""Two sets of images compared: Fréchet distances, Inception Score, precision and recall."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_bench.quality.features import FeatureNetwork, SetFeatures
from dit_bench.quality.frechet import STEPS, Gaussian, frechet_distance
from dit_bench.quality.image_sets import ComparedSet, ImageSource
from dit_bench.quality.metrics import NEIGHBOURS, SPLIT, precision_recall


@dataclass
class Measured:
    """A side after its images were read, or its file's statistics, or both."""

    of: ComparedSet
    found: SetFeatures | None
    distances: tuple[Gaussian, Gaussian | None] = field(init=False)

    def __post_init__(self) -> None:
        if self.of.statistics is not None:
            self.distances = self.of.statistics
        else:
            assert self.found is not None
            self.found.flush()
            self.distances = (self.found.pooled, self.found.spatial)

    def describe(self) -> dict[str, Any]:
        """Its name, the N of distances (None: the file does not tell) and of images."""
        size = None if self.of.images is None else list(self.of.images.size)
        return {
            "name": self.of.name,
            "n": self.distances[0].count,
            "images": 0 if self.found is None else self.found.count,
            "size": size,
        }


def evaluate(
    samples: ComparedSet,
    reference: ComparedSet,
    network: FeatureNetwork,
    batch_size: int = 32,
    allow_few: bool = False,
) -> dict[str, Any]:
    """Every figure with its N. After Ctrl-C "interrupted" says where, and the figures are those
    of the images read until then.

    Raises ValueError for sets that cannot be compared, before any image is read.
    """
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size} is not a positive integer")
    samples, reference = (usable(of, network) for of in (samples, reference))
    for side in (samples, reference):
        check_enough(side, network, allow_few)
    report: dict[str, Any] = {**network.record, "metrics": {}, "interrupted": None}
    with ExitStack() as stack:
        sides = []
        for of in (reference, samples):
            found = None
            if of.images is not None:
                found = stack.enter_context(SetFeatures(network))
                if not report["interrupted"] and not read(of.images, found, batch_size):
                    report["interrupted"] = (
                        f"after {found.count} of {len(of.images)} images of {of.name}"
                    )
            sides.append(Measured(of, found))
        report |= {"samples": sides[1].describe(), "reference": sides[0].describe()}
        try:
            _compare(sides[1], sides[0], network, allow_few, report)
        except KeyboardInterrupt:
            report["interrupted"] = report["interrupted"] or "while comparing"
    return report


def usable(of: ComparedSet, network: FeatureNetwork) -> ComparedSet:
    """``of`` without statistics of other features. ValueError where nothing is left."""
    if of.statistics is None:
        return of
    if network.spatial_width == 0:
        if of.images is None:
            raise ValueError(
                f"{of.name} holds statistics of Inception's features; "
                f"features {network.name!r} need images"
            )
        return ComparedSet(of.name, of.images)
    widths = tuple(s.width for s in of.statistics)
    if widths != (network.width, network.spatial_width):
        raise ValueError(
            f"{of.name} holds statistics of {widths[0]} and {widths[1]} features; "
            f"{network.width} and {network.spatial_width} are needed"
        )
    return of


def check_enough(of: ComparedSet, network: FeatureNetwork, allow_few: bool) -> None:
    """Raise ValueError where there are no more images than features, unless ``allow_few``."""
    if of.statistics is None and of.images is not None and not allow_few:
        need = max(network.width, network.spatial_width) + 1
        if len(of.images) < need:
            raise ValueError(
                f"{of.name} has {len(of.images)} images, too few for {network.width} features; "
                f"at least {need} are needed (or --allow-few)"
            )


def read(
    images: ImageSource,
    into: SetFeatures,
    batch_size: int,
    quiet: bool = False,
    check: Callable[[], object] = lambda: None,
) -> bool:
    """Whether all of the images were read; if not, Ctrl-C was pressed.

    quiet: no progress bar. check: called after every batch; it may raise KeyboardInterrupt.
    """
    from dit_engine.console.bars import Bar

    name = Path(images.name).name or images.name
    with Bar(total=len(images), desc=name, unit="img", delay=2.0, disable=quiet) as bar:
        try:
            for batch in images.batches(batch_size):
                into.add(batch)
                bar.update(len(batch))
                check()
        except KeyboardInterrupt:
            return False
    return True


def shown_distance(
    name: str, a: Gaussian, b: Gaussian, allow_few: bool, quiet: bool = False
) -> float:
    """`frechet_distance` under a bar, which is there from the start where it will take seconds."""
    from dit_engine.console.bars import Bar

    with Bar(total=STEPS, desc=f"{name}: matrix square root", unit="part", leave=False,
              delay=bar_delay(a.width), disable=quiet) as bar:  # fmt: skip
        return frechet_distance(a, b, allow_few=allow_few, step=bar.update)


def bar_delay(width: int) -> float:
    """Seconds before a bar over work on matrices of so many features is drawn."""
    return 0.0 if width >= 512 else 2.0


def _compare(
    samples: Measured,
    reference: Measured,
    network: FeatureNetwork,
    allow_few: bool,
    report: dict[str, Any],
) -> None:
    """Fill in report["metrics"], the quick ones first. What cannot be computed says why."""
    metrics = report["metrics"]
    n, n_reference = samples.distances[0].count, reference.distances[0].count
    if samples.found is not None and samples.found.score is not None and samples.found.count:
        score = samples.found.score
        metrics["Inception Score"] = {
            "value": score.value(),
            "n": score.count,
            "splits": score.splits,
            "split": SPLIT,
        }
    names = (network.metric, f"s{network.metric}")
    for name, a, b in zip(names, samples.distances, reference.distances, strict=True):
        if a is None or b is None:
            continue
        try:
            value = shown_distance(name, a, b, allow_few)
        except ValueError as error:
            if not report["interrupted"]:
                raise
            metrics[name] = {"value": None, "why": str(error), "n": n, "n_reference": n_reference}
            continue
        metrics[name] = {"value": value, "n": n, "n_reference": n_reference}
        if min(count for count in (n, n_reference, a.width + 1) if count is not None) <= a.width:
            metrics[name]["fewer_than_features"] = a.width
    if report["interrupted"]:
        return
    of = "" if network.name == "inception" else f" ({network.name} features)"
    n, n_reference = (None if s.found is None else s.found.count for s in (samples, reference))
    counts = {"n": n, "n_reference": n_reference, "k": NEIGHBOURS}
    why = None
    for side in (samples, reference):
        if side.found is None:
            why = f"{side.of.name} holds statistics, no images"
        elif side.found.count <= NEIGHBOURS:
            why = f"{side.of.name} has {side.found.count} images; more than {NEIGHBOURS} are needed"
    if why is not None or samples.found is None or reference.found is None:
        left_out = {"value": None, "why": why, **counts}
        metrics["precision" + of], metrics["recall" + of] = left_out, dict(left_out)
        return
    precision, recall = precision_recall(reference.found.vectors(), samples.found.vectors())
    metrics["precision" + of] = {"value": precision, **counts}
    metrics["recall" + of] = {"value": recall, **counts}
