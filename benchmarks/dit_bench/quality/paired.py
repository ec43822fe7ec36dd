"""What a backend costs in Fréchet distance, when its images are paired with eager's.

The FIDs of two sets of a model's images differ by chance, by more than a backend costs. Paired
sets, made from the same labels and noise, share that chance, so that their difference can be
resolved: |ΔFID| is the backend's distance to a reference minus eager's own distance to it, and a
bootstrap over pairs says how sure that is.

N is a number of images and D of features. torch is not imported until images are read.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dit_bench.quality import NETWORKS
from dit_bench.quality.frechet import (
    Array,
    Gaussian,
    Statistics,
    bar_delay,
    frechet_distance,
    moments_of,
    symmetric_sqrt,
)

if TYPE_CHECKING:
    import torch

    from dit_bench.quality.features import FeatureNetwork
    from dit_bench.quality.image_sets import ComparedSet

Features = NDArray[np.float32]

CONFIDENCE = 0.95
RESAMPLES = 100  # of the bootstrap
LEAST_RESAMPLES = 20  # of fewer, the 95 % quantiles are the smallest and the largest value
SET_OPTIONS = ("features", "reference_set", "inception_weights", "resamples", "allow_few")


@dataclass(frozen=True)
class SetComparison:
    """How paired sets are compared: by which features, and against which reference, if any.

    moments: of the reference; None until its images are read by `with_moments`.

    Raises ValueError for fewer resamples than `LEAST_RESAMPLES`.
    """

    network: FeatureNetwork
    reference: ComparedSet | None = None
    moments: Gaussian | None = None
    resamples: int = RESAMPLES
    allow_few: bool = False

    def __post_init__(self) -> None:
        if self.resamples < LEAST_RESAMPLES:
            raise ValueError(f"resamples {self.resamples} is not at least {LEAST_RESAMPLES}")

    def with_moments(
        self, quiet: bool = False, check: Callable[[], object] = lambda: None
    ) -> SetComparison:
        """This comparison with the reference's moments, for which its images are read, once.

        quiet: no progress bar. check: called after every batch; it may raise KeyboardInterrupt.

        Raises ValueError for a damaged image, and KeyboardInterrupt if not all images are read.
        """
        from dit_bench.quality.features import SetFeatures

        if self.reference is None or self.moments is not None:
            return self
        if self.reference.statistics is not None:  # a part of the images may be there as well
            return replace(self, moments=self.reference.statistics[0])
        with SetFeatures(self.network, self.reference) as found:
            if not found.read(quiet=quiet, check=check):
                raise KeyboardInterrupt
            return replace(self, moments=found.pooled)

    def suffices(self, n: int) -> bool:
        """Whether n images are enough for the features."""
        return n > self.network.width or (self.allow_few and n > 1)

    def check(self, n: int) -> None:
        """Raise ValueError if n images are too few for the features."""
        width = self.network.width
        if not self.suffices(n):
            raise ValueError(
                f"{n} images are too few for {width} features; at least {width + 1} are needed "
                "(or --allow-few)"
            )

    def compare(
        self,
        found: Features,
        eager: Features,
        quiet: bool = False,
        check: Callable[[], object] = lambda: None,
    ) -> dict[str, Any]:
        """Distances of paired features (N, D), whose rows i have the same label and noise.

        quiet: no progress bar. check: called after every resample; if it raises KeyboardInterrupt,
        that ends the bootstrap. After fewer than `LEAST_RESAMPLES` the bounds of the interval are
        None.
        """
        from dit_engine.console.bars import Bar

        def distance(name: str, a: Gaussian, b: Gaussian) -> float:
            return frechet_distance(a, b, allow_few=self.allow_few, title=None if quiet else name)

        of_found, of_eager = moments_of(found), moments_of(eager)
        row: dict[str, Any] = {
            "metric": self.network.metric,
            "n": len(found),
            "between": distance("between", of_found, of_eager),
        }
        if self.reference is None or self.moments is None:
            return row
        to_found = distance("to reference", of_found, self.moments)
        to_eager = distance("to reference", of_eager, self.moments)
        value = to_found - to_eager
        with Bar(total=self.resamples, desc="bootstrap", delay=bar_delay(self.network.width),
                  disable=quiet) as bar:  # fmt: skip

            def tick() -> None:
                bar.update()
                check()

            draws = paired_bootstrap(found, eager, self.moments, self.resamples, tick=tick)
        low = high = nearest = farthest = None
        if len(draws) >= LEAST_RESAMPLES:
            low, high = interval(draws, value)
            nearest = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
            farthest = max(abs(low), abs(high))
        return row | {
            "reference": self.reference.name,
            "n_reference": self.moments.count,
            "to_reference": to_found,
            "eager_to_reference": to_eager,
            "difference": {"value": value, "low": low, "high": high},
            "absolute_difference": {"value": abs(value), "low": nearest, "high": farthest},
            "confidence": CONFIDENCE,
            "resamples": len(draws),
        }


class DistanceTo:
    """Fréchet distances from many sets to one, whose root is taken once.

    The other set's root is not needed: tr((R C R)^½) is the sum of the roots of the eigenvalues.
    """

    def __init__(self, reference: Gaussian) -> None:
        self.mean = reference.mean
        self.root = symmetric_sqrt(reference.covariance)
        self.trace = float(np.trace(reference.covariance))

    def __call__(self, of: Gaussian) -> float:
        shift = of.mean - self.mean
        values = np.linalg.eigvalsh(self.root @ of.covariance @ self.root)
        overlap = np.sqrt(values.clip(min=0.0)).sum()
        return float(shift @ shift + self.trace + np.trace(of.covariance) - 2 * overlap)


def resampled(features: Array, counts: NDArray[np.integer]) -> Statistics:
    """Moments of the set in which vector i of ``features`` (N, D) occurs counts[i] times."""
    n = int(counts.sum())
    kept = counts > 0
    rows, weights = features[kept], counts[kept]
    mean = weights @ rows / n
    scaled = (rows - mean) * np.sqrt(weights / (n - 1))[:, None]
    return Statistics(mean, scaled.T @ scaled, n)


def paired_bootstrap(
    a: Features,
    b: Features,
    reference: Gaussian,
    resamples: int,
    seed: int = 0,
    tick: Callable[[], object] = lambda: None,
) -> Array:
    """Resampled differences distance(a) - distance(b), (resamples,).

    Rows i of ``a`` and ``b`` (N, D) are one pair, with the same label and noise. Pairs are drawn
    with replacement, N of N; the reference stays the same. ``tick`` is called after each resample;
    a KeyboardInterrupt ends the bootstrap, and the finished resamples, if any, are returned.
    """
    if a.shape != b.shape:
        raise ValueError(f"features {a.shape} and {b.shape} are not paired")
    generator = np.random.default_rng(seed)
    n = len(a)
    distance = DistanceTo(reference)
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    found: list[float] = []
    try:
        while len(found) < resamples:
            counts = np.bincount(generator.integers(0, n, n), minlength=n)
            found.append(distance(resampled(first, counts)) - distance(resampled(second, counts)))
            tick()
    except KeyboardInterrupt:
        pass
    return np.array(found, np.float64)


def interval(draws: NDArray[np.float64], value: float) -> tuple[float, float]:
    """The bootstrap's interval around ``value``, from resampled values.

    A resample holds about N·(1 - 1/e) distinct images. A Fréchet distance grows as images get
    fewer, and not by the same amount for both sets. That shift, the mean of the draws minus
    ``value``, comes from resampling alone and is taken out.
    """
    around = draws - draws.mean() + value
    low, high = np.quantile(around, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def add_set_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `set_comparison` reads: `SET_OPTIONS`."""
    add = parser.add_argument
    add("--features", choices=NETWORKS,
        help="also the distance of the paired sets; lite0 is FD-Lite0, not FID")  # fmt: skip
    add("--reference-set", type=Path, metavar="SET", help="folder or .npz to measure both sets "
        "against, for |ΔFID|; with Inception's features unless --features is given")  # fmt: skip
    add("--inception-weights", type=Path, metavar="FILE",
        help="DIT_INCEPTION_WEIGHTS unless given")  # fmt: skip
    add("--resamples", type=int, metavar="N",
        help=f"of the bootstrap, at least {LEAST_RESAMPLES}; {RESAMPLES} unless given")  # fmt: skip
    add("--allow-few", action="store_true", help="accept fewer images than features")


def set_comparison(arguments: argparse.Namespace, device: torch.device) -> SetComparison | None:
    """What `add_set_arguments` asks for, or None. No image of the reference is read yet.

    Raises ValueError, OSError or ImportError for what cannot be compared.
    """
    from dit_bench.quality.features import load_network
    from dit_bench.quality.image_sets import open_set

    features, path, few = arguments.features, arguments.reference_set, arguments.allow_few
    if path is None:
        refuse_given(arguments, ["resamples"], "--reference-set")
    if features is None and path is None:
        refuse_given(arguments, ["inception_weights", "allow_few"], "--features or --reference-set")
        return None
    network = load_network(features or "inception", arguments.inception_weights, device)
    resamples = RESAMPLES if arguments.resamples is None else arguments.resamples
    sets = SetComparison(network, resamples=resamples, allow_few=few)
    sets.check(arguments.samples)
    return sets if path is None else replace(sets, reference=network.accept(open_set(path), few))


def refuse_given(arguments: argparse.Namespace, names: Iterable[str], needed: str) -> None:
    """Raise ValueError for the first option in ``names`` that was given without ``needed``."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value is not False:
            raise ValueError(f"--{name.replace('_', '-')} is for {needed}, which is not given")
