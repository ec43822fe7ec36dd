"""What a backend costs in Fréchet distance, when its images are paired with eager's.

The FIDs of two sets of a model's images differ by chance, by more than a backend costs. Paired
sets, made from the same labels and noise, have that chance in common, so a small difference can be
measured: |ΔFID| is the difference between the backend's and eager's own distance to a reference,
and a bootstrap over pairs says how sure that is.

N is a number of images and D of features. torch is not imported until images are read.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dit_bench.quality import NETWORKS
from dit_bench.quality.metrics import (
    Array,
    Features,
    Statistics,
    frechet_distance,
    moments_of,
    symmetric_sqrt,
)

if TYPE_CHECKING:
    import torch

    from dit_bench.quality.features import FeatureNetwork
    from dit_bench.quality.image_sets import ComparedSet

CONFIDENCE = 0.95
RESAMPLES = 100  # of the bootstrap
LEAST_RESAMPLES = 20  # with fewer, the 95 % interval is from the smallest to the largest value
SET_OPTIONS = ("features", "reference_set", "inception_weights", "resamples", "allow_few")


@dataclass(frozen=True)
class SetComparison:
    """How paired sets are compared: by which features, and against which reference, if any.

    moments: of the reference; None until its images are read by `with_moments`.
    """

    network: FeatureNetwork
    reference: ComparedSet | None = None
    moments: Statistics | None = None
    resamples: int = RESAMPLES
    allow_few: bool = False

    def with_moments(self, quiet: bool, check: Callable[[], object]) -> SetComparison:
        """This comparison with the reference's moments, for which its images are read, once.

        quiet: no progress bar. check: called after every batch; it may raise KeyboardInterrupt.
        """
        from dit_bench.quality.features import moments

        if (of := self.reference) is None or self.moments is not None:
            return self
        found = None if of.statistics else self.network.read(of, quiet=quiet, check=check)
        return replace(self, moments=moments(of, found))

    def compare(
        self, found: Features, eager: Features, quiet: bool, check: Callable[[], object]
    ) -> dict[str, Any]:
        """Distances of paired features (N, D): row i of both has the same label and noise.

        check: called after every resample; it may raise KeyboardInterrupt.
        """
        from dit_engine.console.bars import Bar

        of_found, of_eager = moments_of(found), moments_of(eager)
        distance = partial(frechet_distance, allow_few=self.allow_few)
        row: dict[str, Any] = {
            "metric": self.network.metric, "n": len(found), "between": distance(of_found, of_eager)
        }  # fmt: skip
        if self.reference is None or self.moments is None:
            return row
        with Bar(total=self.resamples, desc="bootstrap", disable=quiet) as bar:

            def tick() -> None:
                bar.update()
                check()

            to_found, to_eager = (distance(of, self.moments) for of in (of_found, of_eager))
            draws = paired_bootstrap(found, eager, self.moments, self.resamples, tick=tick)
        value = to_found - to_eager
        low, high = interval(draws, value)
        nearest, farthest = sorted(map(abs, (low, high)))
        nearest = 0.0 if low <= 0 <= high else nearest
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


def distances_to(reference: Statistics) -> Callable[[Statistics], float]:
    """A function that gives Fréchet distances to ``reference``, whose root R is computed once.

    The root of the other covariance C is not needed: tr((R C R)^½) sums the eigenvalues' roots.
    """
    root, trace = symmetric_sqrt(reference.covariance), float(np.trace(reference.covariance))

    def distance(of: Statistics) -> float:
        shift = of.mean - reference.mean
        values = np.linalg.eigvalsh(root @ of.covariance @ root)
        overlap = np.sqrt(values.clip(min=0.0)).sum()
        return float(shift @ shift + trace + np.trace(of.covariance) - 2 * overlap)

    return distance


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
    reference: Statistics,
    resamples: int,
    seed: int = 0,
    tick: Callable[[], object] = lambda: None,
) -> Array:
    """Resampled differences distance(a) - distance(b), (resamples,).

    Rows i of ``a`` and ``b`` (N, D) are one pair, with the same label and noise. Pairs are drawn
    with replacement, N of N; the reference stays the same. ``tick`` is called after each resample.
    """
    generator, n = np.random.default_rng(seed), len(a)
    distance = distances_to(reference)
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    draws = []
    for _ in range(resamples):
        counts = np.bincount(generator.integers(0, n, n), minlength=n)
        draws.append(distance(resampled(first, counts)) - distance(resampled(second, counts)))
        tick()
    return np.array(draws)


def interval(draws: NDArray[np.float64], value: float) -> tuple[float, float]:
    """The bootstrap's interval around ``value``, from resampled values.

    A resample holds about N·(1 - 1/e) distinct images. A Fréchet distance is larger for fewer
    images, and not by the same amount for both sets. This shift, the mean of the draws minus
    ``value``, comes from resampling alone and is subtracted.
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
    """The comparison that the options ask for, or None. No image of the reference is read yet.

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
    resamples = RESAMPLES if arguments.resamples is None else arguments.resamples
    if resamples < LEAST_RESAMPLES:
        raise ValueError(f"resamples {resamples} is not at least {LEAST_RESAMPLES}")
    network = load_network(features or "inception", arguments.inception_weights, device)
    sets = SetComparison(network, resamples=resamples, allow_few=few)
    if (n := arguments.samples) < (need := 2 if few else network.width + 1):
        raise ValueError(f"{n} images are too few for {network.width} features; at least {need} "
                         "are needed (or --allow-few)")  # fmt: skip
    return sets if path is None else replace(sets, reference=network.accept(open_set(path), few))


def refuse_given(arguments: argparse.Namespace, names: Iterable[str], needed: str) -> None:
    """Raise ValueError for the first option in ``names`` that was given without ``needed``."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value is not False:
            raise ValueError(f"--{name.replace('_', '-')} is for {needed}, which is not given")
