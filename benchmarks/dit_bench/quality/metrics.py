"""What is said of image sets beside the Fréchet distance, from features and class probabilities.

- Inception Score (Salimans et al. 2016, arXiv 1606.03498), over splits of 5000 images in their
  order, as ADM's evaluator takes it.
- Precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991) with k = 3 neighbours.
- The paired bootstrap of a difference of Fréchet distances.

N is a number of images, D of features, K of classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from dit_bench.quality.frechet import Array, Gaussian, Statistics, symmetric_sqrt
from dit_bench.quality.set_arguments import LEAST_RESAMPLES

Features = NDArray[np.float32]

SPLIT = 5000
NEIGHBOURS = 3
_ROWS = 4096  # of a block of distances: 64 MiB in float32


class InceptionScore:
    """exp(mean KL(p(y|x) ‖ p(y))), gathered in one pass: an average over splits in order."""

    def __init__(self, split: int = SPLIT) -> None:
        if split < 1:
            raise ValueError(f"split {split} is not a positive number of images")
        self.split, self.count = split, 0
        self._scores: list[float] = []
        self._begin()

    def _begin(self) -> None:
        self._n, self._entropy = 0, 0.0  # the sum of Σ p log p of the split so far
        self._total: Array | float = 0.0

    def update(self, log_probabilities: NDArray[np.floating]) -> None:
        """Add rows (n, K) of natural logarithms of probabilities."""
        rows = np.asarray(log_probabilities, np.float64)
        while len(rows):
            part, rows = np.split(rows, [self.split - self._n])
            p = np.exp(part)
            self._entropy += float(np.multiply(p, part, where=p > 0, out=np.zeros_like(p)).sum())
            self._total = self._total + p.sum(axis=0)
            self._n += len(part)
            self.count += len(part)
            if self._n == self.split:
                self._scores.append(self._score())
                self._begin()

    def _score(self) -> float:
        mean = np.asarray(self._total) / self._n
        used = mean[mean > 0]
        return float(np.exp(self._entropy / self._n - (used * np.log(used)).sum()))

    @property
    def splits(self) -> int:
        """Splits seen, the last of which may be shorter."""
        return len(self._scores) + (self._n > 0)

    def value(self) -> float:
        """The mean over the splits. ValueError before the first image."""
        scores = self._scores + ([self._score()] if self._n else [])
        if not scores:
            raise ValueError("the Inception Score of no images")
        return float(np.mean(scores))


def precision_recall(
    reference: Features,
    samples: Features,
    k: int = NEIGHBOURS,
    rows: int = _ROWS,
) -> tuple[float, float]:
    """The fractions of samples within the reference's manifold, and the other way round.

    A set's manifold is the union of balls around its vectors, each as wide as the distance to its
    k-th nearest neighbour in the set.

    Args:
        reference, samples: (N, D) and (M, D); memory-mapped arrays are read in blocks.
        rows: vectors to a side of a block of distances.

    Raises ValueError for sets of k vectors or fewer, or different D.
    """
    if reference.shape[1] != samples.shape[1]:
        raise ValueError(
            f"features of width {reference.shape[1]} and {samples.shape[1]} cannot be compared"
        )
    from dit_engine.console.bars import Bar

    n, m = (-(-len(of) // rows) for of in (reference, samples))  # blocks
    total = n * n + m * m + n * m
    with Bar(total=total, desc="precision, recall", unit="block", delay=2.0) as bar:
        centre = _mean(reference, rows)  # distances do not change, their rounding errors shrink
        reference_radii = _radii(reference, k, rows, centre, bar.update)
        sample_radii = _radii(samples, k, rows, centre, bar.update)
        in_reference = torch.zeros(len(samples), dtype=torch.bool)
        in_samples = torch.zeros(len(reference), dtype=torch.bool)
        for i, a in _blocks(samples, rows, centre):
            for j, b in _blocks(reference, rows, centre):
                d = _squared_distances(a, b)  # (samples, reference)
                in_reference[i] |= (d <= reference_radii[j]).any(dim=1)
                in_samples[j] |= (d <= sample_radii[i, None]).any(dim=0)
                bar.update()
    return float(in_reference.double().mean()), float(in_samples.double().mean())


def _radii(
    features: Features,
    k: int,
    rows: int,
    centre: torch.Tensor,
    tick: Callable[[], object],
) -> torch.Tensor:
    """(N,) squared distance of each vector to its k-th nearest other one."""
    if len(features) <= k:
        raise ValueError(f"{len(features)} images are too few for {k} neighbours of each")
    found = []
    for _, a in _blocks(features, rows, centre):
        nearest = torch.empty(len(a), 0)
        for _, b in _blocks(features, rows, centre):
            both = torch.cat([nearest, _squared_distances(a, b)], dim=1)
            nearest = both.topk(min(k + 1, both.shape[1]), largest=False).values  # and itself
            tick()
        found.append(nearest[:, -1])
    return torch.cat(found)


def _blocks(
    features: Features, rows: int, centre: torch.Tensor
) -> Iterable[tuple[slice, torch.Tensor]]:
    for start in range(0, len(features), rows):
        part = slice(start, min(start + rows, len(features)))
        yield part, torch.from_numpy(np.array(features[part], np.float32)) - centre


def _mean(features: Features, rows: int) -> torch.Tensor:
    zero = torch.zeros(features.shape[1])
    total = sum(block.double().sum(0) for _, block in _blocks(features, rows, zero))
    return torch.as_tensor(total / max(len(features), 1)).float()


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(n, m), float32. The kernels of evaluators round to float16 first; this does not."""
    squared = a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)[None]
    return squared.clamp(min=0.0)


def resampled(features: Array, counts: NDArray[np.integer]) -> Statistics:
    """Moments of the set in which vector i of ``features`` (N, D) occurs counts[i] times."""
    n = int(counts.sum())
    kept = counts > 0
    rows, weights = features[kept], counts[kept]
    mean = weights @ rows / n
    scaled = (rows - mean) * np.sqrt(weights / (n - 1))[:, None]
    return Statistics(mean, scaled.T @ scaled, n)


class DistanceTo:
    """Fréchet distances of many sets to one, whose root is taken once.

    A set's own root is not needed: tr((R C R)^½) is the sum of the roots of the eigenvalues.
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


def paired_bootstrap(
    a: Features,
    b: Features,
    reference: Gaussian,
    resamples: int,
    seed: int = 0,
    tick: Callable[[], object] = lambda: None,
) -> Array:
    """Resampled differences distance(a) - distance(b), (resamples,).

    Rows i of ``a`` and ``b`` (N, D) are one pair, the same label and noise, and are drawn together,
    N of N with replacement; the reference stays. ``tick`` is called after each; a KeyboardInterrupt
    ends it with those that are finished, which may be none.
    """
    if a.shape != b.shape:
        raise ValueError(f"features {a.shape} and {b.shape} are not paired")
    if resamples < LEAST_RESAMPLES:
        raise ValueError(f"resamples {resamples} is not at least {LEAST_RESAMPLES}")
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
