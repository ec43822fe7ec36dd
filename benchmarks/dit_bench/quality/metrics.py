"""What is said about sets of images besides the Fréchet distance.

- Inception Score (Salimans et al. 2016, arXiv 1606.03498), over splits of 5000 images in their
  order, as in ADM's evaluator.
- Precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991) with k = 3 neighbours.

N is a number of images, D of features, K of classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

Features = NDArray[np.float32]

SPLIT = 5000
NEIGHBOURS = 3
_ROWS = 4096  # a block of distances has this many rows and columns: 64 MiB in float32


class InceptionScore:
    """exp(mean KL(p(y|x) ‖ p(y))), gathered in one pass; the mean over splits in order."""

    def __init__(self, split: int = SPLIT) -> None:
        if split < 1:
            raise ValueError(f"split {split} is not a positive number of images")
        self.split, self.count = split, 0
        self._scores: list[float] = []
        self._begin()

    def _begin(self) -> None:
        """Begin a split: its images, its sum of Σ p log p, and its sum of p."""
        self._n, self._entropy = 0, 0.0
        self._total: NDArray[np.float64] | float = 0.0

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
        """Splits seen; the last one may be shorter."""
        return len(self._scores) + (self._n > 0)

    def value(self) -> float:
        """The mean over the splits. ValueError before the first image."""
        scores = self._scores + ([self._score()] if self._n else [])
        if not scores:
            raise ValueError("the Inception Score of no images")
        return float(np.mean(scores))


def precision_recall(
    reference: Features, samples: Features, k: int = NEIGHBOURS, rows: int = _ROWS
) -> tuple[float, float]:
    """The fraction of samples within the reference's manifold, and the reverse.

    A set's manifold is the union of balls around its vectors; the radius of each is the distance to
    its k-th nearest neighbour in the set.

    Args:
        reference, samples: (N, D) and (M, D); memory-mapped arrays are read in blocks.
        rows: vectors along each side of a block of distances.

    Raises ValueError for sets of k vectors or fewer, or different D.
    """
    from dit_engine.console.bars import Bar

    if reference.shape[1] != samples.shape[1]:
        raise ValueError(
            f"features of width {reference.shape[1]} and {samples.shape[1]} cannot be compared"
        )
    n, m = (-(-len(of) // rows) for of in (reference, samples))  # blocks
    total = n * n + m * m + n * m
    with Bar(total=total, desc="precision, recall", unit="block", delay=2.0) as bar:
        zero = torch.zeros(reference.shape[1])
        mean = sum(block.double().sum(0) for _, block in _blocks(reference, rows, zero))
        # Subtracting the mean changes no distance, and makes their rounding errors smaller.
        centre = torch.as_tensor(mean / max(len(reference), 1)).float()
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
    features: Features, k: int, rows: int, centre: torch.Tensor, tick: Callable[[], object]
) -> torch.Tensor:
    """(N,) squared distance from each vector to its k-th nearest other one."""
    if len(features) <= k:
        raise ValueError(f"{len(features)} images are too few for {k} neighbours of each")
    found = []
    for _, a in _blocks(features, rows, centre):
        nearest = torch.empty(len(a), 0)
        for _, b in _blocks(features, rows, centre):
            both = torch.cat([nearest, _squared_distances(a, b)], dim=1)
            # k + 1, because each vector is also the nearest one to itself.
            nearest = both.topk(min(k + 1, both.shape[1]), largest=False).values
            tick()
        found.append(nearest[:, -1])
    return torch.cat(found)


def _blocks(
    features: Features, rows: int, centre: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    for start in range(0, len(features), rows):
        part = slice(start, min(start + rows, len(features)))
        yield part, torch.from_numpy(np.array(features[part], np.float32)) - centre


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(n, m) in float32. Published evaluators round to float16 first; this does not."""
    squared = a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)[None]
    return squared.clamp(min=0.0)
