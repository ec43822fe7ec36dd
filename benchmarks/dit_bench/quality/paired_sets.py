"""Set against set: what a backend costs in Fréchet distance, its images paired with eager's.

FID differs by chance between two sets of a model's images, by more than a backend costs. Paired,
with the same labels and noise, both sets share that chance, and their difference can be resolved:
|ΔFID| is the distance of the backend's set to a reference less that of eager's own, and a bootstrap
over pairs says how sure that is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_bench.quality.features import FeatureNetwork, SetFeatures
from dit_bench.quality.frechet import Gaussian, moments_of
from dit_bench.quality.image_sets import ComparedSet, open_set
from dit_bench.quality.metrics import paired_bootstrap
from dit_bench.quality.set_arguments import LEAST_RESAMPLES, RESAMPLES
from dit_bench.quality.set_distances import bar_delay, check_enough, read, shown_distance, usable

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Reference:
    """Moments that both sets are measured against."""

    name: str
    moments: Gaussian


@dataclass(frozen=True)
class SetComparison:
    """How sets are compared: by which features, to which reference if any.

    unread: the reference's set, while its images are yet to be read (`with_reference`).
    """

    network: FeatureNetwork
    reference: Reference | None = None
    resamples: int = RESAMPLES
    allow_few: bool = False
    unread: ComparedSet | None = None

    def __post_init__(self) -> None:
        if self.resamples < LEAST_RESAMPLES:
            raise ValueError(f"resamples {self.resamples} is not at least {LEAST_RESAMPLES}")

    def with_reference(
        self, quiet: bool = False, check: Callable[[], object] = lambda: None
    ) -> SetComparison:
        """This, with the moments of a reference that was only opened before.

        quiet: no progress bar. check: called after every batch; it may raise KeyboardInterrupt.
        """
        if self.unread is None:
            return self
        reference = read_reference(self.unread, self.network, quiet=quiet, check=check)
        return replace(self, reference=reference, unread=None)

    def suffices(self, n: int) -> bool:
        """Whether n images are enough for the features."""
        return n > self.network.width or (self.allow_few and n > 1)

    def check(self, n: int) -> None:
        """Raise ValueError where n images are too few for the features."""
        width = self.network.width
        if not self.suffices(n):
            raise ValueError(
                f"{n} images are too few for {width} features; at least {width + 1} are needed "
                "(or --allow-few)"
            )

    def compare(
        self,
        found: NDArray[np.float32],
        eager: NDArray[np.float32],
        quiet: bool = False,
        check: Callable[[], object] = lambda: None,
    ) -> dict[str, Any]:
        """Distances of paired features (N, D), rows of one label and noise, N beside them.

        quiet: no progress bar. check: called after every resample; what it raises as
        KeyboardInterrupt ends the bootstrap. The bounds of an interval are None after fewer than
        `LEAST_RESAMPLES`.
        """
        from dit_engine.console.bars import Bar

        few, n = self.allow_few, len(found)
        of_found, of_eager = moments_of(found), moments_of(eager)
        row: dict[str, Any] = {
            "metric": self.network.metric,
            "n": n,
            "between": shown_distance("between", of_found, of_eager, few, quiet),
        }
        if self.reference is None:
            return row
        moments = self.reference.moments
        to_found, to_eager = (
            shown_distance("to reference", own, moments, few, quiet) for own in (of_found, of_eager)
        )
        with Bar(total=self.resamples, desc="bootstrap", delay=bar_delay(moments.width),
                  disable=quiet) as bar:  # fmt: skip

            def tick() -> None:
                bar.update()
                check()

            draws = paired_bootstrap(found, eager, moments, self.resamples, tick=tick)
        low = high = nearest = farthest = None
        if len(draws) >= LEAST_RESAMPLES:
            low, high = interval(draws, to_found - to_eager)
            nearest = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
            farthest = max(abs(low), abs(high))
        return row | {
            "reference": self.reference.name,
            "n_reference": moments.count,
            "to_reference": to_found,
            "eager_to_reference": to_eager,
            "difference": {
                "value": to_found - to_eager,
                "low": low,
                "high": high,
            },
            "absolute_difference": {
                "value": abs(to_found - to_eager),
                "low": nearest,
                "high": farthest,
            },
            "confidence": CONFIDENCE,
            "resamples": len(draws),
        }


def interval(draws: NDArray[np.float64], value: float) -> tuple[float, float]:
    """The bootstrap's interval around ``value``, from resampled values.

    A resample holds about N·(1 - 1/e) distinct images, and a Fréchet distance is the larger the
    fewer there are, not by the same amount for both sets. That shift, the mean of the draws less
    ``value``, belongs to resampling alone and is taken out.
    """
    around = draws - draws.mean() + value
    low, high = np.quantile(around, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def open_reference(path: Path, network: FeatureNetwork, allow_few: bool = False) -> ComparedSet:
    """A folder or an .npz, of which no image is read. ValueError or OSError where it cannot be
    compared."""
    of = usable(open_set(path), network)
    check_enough(of, network, allow_few)
    return of


def read_reference(
    of: ComparedSet,
    network: FeatureNetwork,
    batch_size: int = 32,
    quiet: bool = False,
    check: Callable[[], object] = lambda: None,
) -> Reference:
    """Moments of a set's images, or those that its file holds.

    Raises ValueError for a damaged image, KeyboardInterrupt where it is not read whole.
    """
    if of.statistics is not None:
        return Reference(of.name, of.statistics[0])
    assert of.images is not None
    with SetFeatures(network) as found:
        if not read(of.images, found, batch_size, quiet, check):
            raise KeyboardInterrupt
        found.flush()
        return Reference(of.name, found.pooled)


def format_row(row: dict[str, Any]) -> list[str]:
    """Lines of a comparison, N beside every distance."""
    metric = row["metric"]
    lines = [f"  {metric} to eager's set {row['between']:.4g} (N = {row['n']} pairs)"]
    if "reference" in row:
        n = row["n_reference"] or "unknown, statistics only"
        lines.append(
            f"  {metric} to {row['reference']}: {row['to_reference']:.4f}, eager's "
            f"{row['eager_to_reference']:.4f} (N = {row['n']} each against {n})"
        )
        d = row["absolute_difference"]
        found = f"no interval below {LEAST_RESAMPLES} resamples"
        if d["low"] is not None:
            found = f"{row['confidence']:.0%} interval {d['low']:.3g} to {d['high']:.3g}"
        lines.append(
            f"  |Δ{metric}| {d['value']:.3g}, {found} "
            f"({row['resamples']} paired resamples of N = {row['n']})"
        )
    return lines
