"""Figures of sets of images, computed from a network's features of the images.

- The Fréchet distance of two Gaussians with means m and covariances C (Fréchet 1957; Dowson &
  Landau 1982; used on network features by Heusel et al. 2017, arXiv 1706.08500):

      |m_a - m_b|² + tr(C_a) + tr(C_b) - 2 tr((C_a^½ C_b C_a^½)^½)

- Inception Score (Salimans et al. 2016, arXiv 1606.03498), over splits of 5000 images in their
  order, as in ADM's evaluator.
- Precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991) with k = 3 neighbours.

N is a number of images, D of features, K of classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[np.float64]
Features = NDArray[np.float32]

SPLIT = 5000
NEIGHBOURS = 3
ROWS = 512  # vectors that are added to a set's moments at once; each addition costs D²
_BLOCK = 4096  # a block of distances has this many rows and columns: 64 MiB in float32
# Allowed size of a negative eigenvalue, relative to the largest one. Rounding in float64 leaves
# about 1e-13 at D = 1280.
_NEGATIVE = 1e-9


@dataclass(frozen=True)
class Statistics:
    """The mean (D,) and covariance (D, D) of N vectors; count is N, or None if it is unknown."""

    mean: Array
    covariance: Array
    count: int | None = None

    @property
    def width(self) -> int:
        """D, features of one vector."""
        return len(self.mean)


def moments_of(features: ArrayLike, rows: int | None = None) -> Statistics:
    """Mean and covariance (divided by N - 1 as in FID's reference code) of an array (N, D), in
    float64.

    Partial sums are combined as by Chan, Golub & LeVeque (1979): the scatter is always taken about
    the current mean, so no digits cancel as they would in E[x²] - E[x]².

    rows: how many vectors are converted to float64 at once; None: all.

    Raises ValueError for a value that is not finite.
    """
    every = np.asarray(features)
    count, width = every.shape
    step = rows or max(count, 1)
    mean, scatter = np.zeros(width), np.zeros((width, width))
    for done in range(0, count, step):
        part = np.asarray(every[done : done + step], np.float64)
        if not np.isfinite(part).all():
            raise ValueError("features hold a NaN or an infinity; finite numbers are needed")
        centre = part.mean(axis=0)
        centred, delta, total = part - centre, centre - mean, done + len(part)
        between = np.outer(delta, delta) * (done * len(part) / total)
        scatter += centred.T @ centred + between
        mean = mean + delta * (len(part) / total)
    return Statistics(mean, scatter / max(count - 1, 1), count)


def frechet_distance(a: Statistics, b: Statistics, *, allow_few: bool = False) -> float:
    """The Fréchet distance of two sets (a squared distance, as FID is), at least 0.

    allow_few: accept N ≤ D. The covariance is then singular and the distance says more about N
        than about the images, so without this it is an error.

    Raises ValueError if the widths differ, a set is too small, or a covariance is not positive.
    """
    if a.width != b.width:
        raise ValueError(f"features of width {a.width} and {b.width} cannot be compared")
    need = 2 if allow_few else a.width + 1
    for side in (a, b):
        if side.count is not None and side.count < need:
            raise ValueError(f"{side.count} images are too few for {a.width} features; at least "
                             f"{need} are needed")  # fmt: skip
    first, second = symmetric_sqrt(a.covariance), symmetric_sqrt(b.covariance)
    # tr((a^½ b a^½)^½) is the sum of the singular values of a^½ b^½. The roots of the product's
    # eigenvalues have the same sum, but would enlarge the rounding errors of those near zero.
    overlap = float(np.linalg.svd(first @ second, compute_uv=False).sum())
    shift, traces = a.mean - b.mean, (np.trace(a.covariance), np.trace(b.covariance))
    # For equal sets, rounding can leave a value below 0.
    return max(float(shift @ shift + traces[0] + traces[1] - 2 * overlap), 0.0)


def symmetric_sqrt(matrix: Array) -> Array:
    """The symmetric square root (D, D) of a symmetric positive semi-definite matrix.

    Raises ValueError if an eigenvalue is negative by more than rounding.
    """
    values, vectors = np.linalg.eigh(matrix)
    if values[0] < -_NEGATIVE * np.abs(values).max():
        raise ValueError(f"covariance has eigenvalue {values[0]:.3g}; none may be negative")
    return (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T


def inception_score(log_probabilities: Features, split: int = SPLIT) -> float:
    """exp(mean KL(p(y|x) ‖ p(y))), the mean over splits in order, of which the last may be shorter.

    log_probabilities: (N, K) natural logarithms, N > 0; a memory-mapped array is read in blocks.
    """
    count, scores = len(log_probabilities), []
    for start in range(0, count, split):
        stop = min(start + split, count)
        entropy, total = 0.0, np.zeros(log_probabilities.shape[1])  # Σ p log p, and the sum of p
        edges = [start, *range(start - start % ROWS + ROWS, stop, ROWS), stop]
        for low, high in pairwise(edges):
            part = np.asarray(log_probabilities[low:high], np.float64)
            p = np.exp(part)
            entropy += float(np.multiply(p, part, where=p > 0, out=np.zeros_like(p)).sum())
            total = total + p.sum(axis=0)
        mean = total / (stop - start)
        used = mean[mean > 0]
        scores.append(np.exp(entropy / (stop - start) - (used * np.log(used)).sum()))
    return float(np.mean(scores))


def precision_recall(
    reference: Features, samples: Features, k: int = NEIGHBOURS, rows: int = _BLOCK
) -> tuple[float, float]:
    """The fraction of samples within the reference's manifold, and the reverse.

    A set's manifold is the union of balls around its vectors; the radius of each is the distance to
    its k-th nearest neighbour in the set.

    Args:
        reference, samples: (N, D) and (M, D); memory-mapped arrays are read in blocks.
        rows: vectors along each side of a block of distances.

    Raises ValueError for sets of k vectors or fewer.
    """
    import torch

    from dit_engine.console.bars import Bar

    for side in (reference, samples):
        if len(side) <= k:
            raise ValueError(f"{len(side)} images are too few for {k} neighbours of each")
    # Subtracting the mean changes no distance, and makes their rounding errors smaller.
    centre = torch.from_numpy(np.asarray(reference).mean(axis=0, dtype=np.float64)).float()
    n, m = (-(-len(side) // rows) for side in (reference, samples))  # blocks
    bar = Bar(total=n * n + m * m + n * m, desc="precision, recall", unit="block", delay=2.0)

    def blocks(features: Features) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(features), rows):
            part = slice(start, min(start + rows, len(features)))
            yield part, torch.from_numpy(np.array(features[part], np.float32)) - centre

    def squared_distances(a: Tensor, b: Tensor) -> Tensor:
        """(n, m) in float32. Published evaluators round to float16 first; this does not."""
        squared = a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)[None]
        bar.update()
        return squared.clamp(min=0.0)

    def radii(features: Features) -> Tensor:
        """(N,) squared distance from each vector to its k-th nearest other one."""
        found = []
        for _, a in blocks(features):
            nearest = torch.empty(len(a), 0)
            for _, b in blocks(features):
                both = torch.cat([nearest, squared_distances(a, b)], dim=1)
                # k + 1, because each vector is also the nearest one to itself.
                nearest = both.topk(min(k + 1, both.shape[1]), largest=False).values
            found.append(nearest[:, -1])
        return torch.cat(found)

    with bar:
        reference_radii, sample_radii = radii(reference), radii(samples)
        in_reference = torch.zeros(len(samples), dtype=torch.bool)
        in_samples = torch.zeros(len(reference), dtype=torch.bool)
        for i, a in blocks(samples):
            for j, b in blocks(reference):
                d = squared_distances(a, b)  # (samples, reference)
                in_reference[i] |= (d <= reference_radii[j]).any(dim=1)
                in_samples[j] |= (d <= sample_radii[i, None]).any(dim=0)
    return float(in_reference.double().mean()), float(in_samples.double().mean())
