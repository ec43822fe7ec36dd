"""Fréchet distance between two sets of feature vectors, from moments gathered in one pass.

For Gaussians with means m and covariances C (Fréchet 1957; Dowson & Landau 1982; used on network
features by Heusel et al. 2017, arXiv 1706.08500):

    |m_a - m_b|² + tr(C_a) + tr(C_b) - 2 tr((C_a^½ C_b C_a^½)^½)

D is the number of features throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

# Both are relative to the largest eigenvalue. float64 leaves about 1e-13 at D = 1280.
_NEGATIVE_LIMIT = 1e-9
_ROOT_LIMIT = 1e-9
STEPS = 3  # long parts of a distance
_SINGLE_LIMIT = 1e-5  # of covariances stored in float32


class Gaussian(Protocol):
    """What a Fréchet distance is taken of: `Moments`, or `Statistics` that a file holds."""

    @property
    def count(self) -> int | None:
        """Vectors seen; None where that is unknown."""
        ...

    @property
    def width(self) -> int: ...

    @property
    def mean(self) -> Array: ...

    @property
    def covariance(self) -> Array: ...


@dataclass(frozen=True)
class Statistics:
    """A mean (D,) and a covariance (D, D) from elsewhere.

    count: of how many vectors; None where a file does not tell.

    Raises ValueError for other shapes, numbers that are not finite, or a covariance that is not
    symmetric. One in float32 may have eigenvalues a rounding error below 0, which become 0.
    """

    mean: Array
    covariance: Array
    count: int | None = None

    def __post_init__(self) -> None:
        mean, covariance = np.asarray(self.mean), np.asarray(self.covariance)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"mean {mean.shape} and covariance {covariance.shape}; (D,), (D, D) are needed"
            )
        for name, value in (("mean", mean), ("covariance", covariance)):
            if value.dtype.kind != "f" or not np.isfinite(value).all():
                raise ValueError(f"{name} ({value.dtype}) is not made of finite floating numbers")
        single = covariance.dtype.itemsize < 8
        covariance = covariance.astype(np.float64)
        scale = np.abs(covariance).max(initial=0.0)
        if np.abs(covariance - covariance.T).max(initial=0.0) > 1e-6 * scale:
            raise ValueError("covariance is not symmetric")
        covariance = (covariance + covariance.T) / 2
        if single:
            values, vectors = np.linalg.eigh(covariance)
            if _SINGLE_LIMIT * values[-1] > -values[0] > 0:
                covariance = (vectors * values.clip(min=0.0)) @ vectors.T
        object.__setattr__(self, "mean", mean.astype(np.float64))
        object.__setattr__(self, "covariance", covariance)

    @property
    def width(self) -> int:
        """D, features of one vector."""
        return len(self.mean)


class Moments:
    """Count, mean and covariance of a stream of vectors, float64, in memory that N never enters.

    Partial sums are combined as Chan, Golub & LeVeque (1979) do: the scatter is always about the
    mean so far, so nothing is lost to cancellation as in E[x²] - E[x]².
    """

    def __init__(self, width: int) -> None:
        """width: D, features of one vector."""
        if width < 1:
            raise ValueError(f"width {width} is not a positive number of features")
        self.count = 0
        self.mean: Array = np.zeros(width)
        self._scatter: Array = np.zeros((width, width))

    @property
    def width(self) -> int:
        """D, features of one vector."""
        return len(self.mean)

    def update(self, features: ArrayLike) -> None:
        """Add the rows of ``features`` (n, D); n may be 0.

        Raises ValueError for another shape or a value that is not finite.
        """
        rows = np.asarray(features, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise ValueError(f"features have shape {rows.shape}; (n, {self.width}) is needed")
        if not np.isfinite(rows).all():
            raise ValueError("features hold a NaN or an infinity; finite numbers are needed")
        if len(rows):
            mean = rows.mean(axis=0)
            centred = rows - mean
            self._combine(len(rows), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Add the vectors that ``other`` has seen. Raises ValueError where the widths differ."""
        if other.width != self.width:
            raise ValueError(f"width {other.width} cannot be merged into width {self.width}")
        if other.count:
            self._combine(other.count, other.mean, other._scatter)

    def _combine(self, count: int, mean: Array, scatter: Array) -> None:
        total = self.count + count
        delta = mean - self.mean
        self._scatter += scatter + np.outer(delta, delta) * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    @property
    def covariance(self) -> Array:
        """(D, D), divided by N - 1 as FID's reference code does. ValueError below two vectors."""
        if self.count < 2:
            raise ValueError(f"covariance of {self.count} vectors; at least 2 are needed")
        return self._scatter / (self.count - 1)


def moments_of(features: ArrayLike) -> Moments:
    """Moments of an array (N, D)."""
    rows = np.asarray(features)
    if rows.ndim != 2:
        raise ValueError(f"features have shape {rows.shape}; (N, D) is needed")
    moments = Moments(rows.shape[1])
    moments.update(rows)
    return moments


def frechet_distance(
    a: Gaussian, b: Gaussian, *, allow_few: bool = False, step: Callable[[], object] = lambda: None
) -> float:
    """The Fréchet distance of two sets (a squared distance, as FID is), at least 0.

    Args:
        allow_few: accept N ≤ D. The covariance is then singular and the distance says more about
            N than about the images, so without this it is an error.
        step: called `STEPS` times, after each long part: seconds at D = 2048.

    Raises:
        ValueError: the widths differ, a set is too small, or a covariance is not positive.
    """
    if a.width != b.width:
        raise ValueError(f"features of width {a.width} and {b.width} cannot be compared")
    for moments in (a, b):
        if moments.count is not None and moments.count <= a.width and not allow_few:
            raise ValueError(
                f"{moments.count} images are too few for {a.width} features; "
                f"at least {a.width + 1} are needed (or allow_few)"
            )
    shift = a.mean - b.mean
    covariance_a, covariance_b = a.covariance, b.covariance
    overlap = trace_sqrt_product(covariance_a, covariance_b, step)
    distance = float(shift @ shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * overlap)
    return max(distance, 0.0)  # equal sets leave a rounding error of either sign


def trace_sqrt_product(a: Array, b: Array, step: Callable[[], object] = lambda: None) -> float:
    """tr((a^½ b a^½)^½) of two symmetric positive semi-definite matrices (D, D).

    It is the sum of the singular values of a^½ b^½. Taking those, and not the square roots of the
    product's eigenvalues, keeps the rounding errors of near-zero eigenvalues from being rooted.
    """
    roots = []
    for matrix in (a, b):
        roots.append(symmetric_sqrt(matrix))
        step()
    trace = float(np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum())
    step()
    return trace


def symmetric_sqrt(matrix: Array) -> Array:
    """The symmetric square root (D, D) of a symmetric positive semi-definite matrix, checked.

    Raises ValueError where an eigenvalue is negative beyond rounding, or where the root squared
    does not give the matrix back.
    """
    values, vectors = np.linalg.eigh(matrix)
    largest = max(float(np.abs(values).max()), np.finfo(np.float64).tiny)
    if values[0] < -_NEGATIVE_LIMIT * largest:
        raise ValueError(f"covariance has eigenvalue {values[0]:.3g}; none may be negative")
    root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    error = float(np.abs(root @ root - matrix).max()) / largest
    if not error <= _ROOT_LIMIT:
        raise ValueError(f"matrix square root is off by {error:.3g}; {_ROOT_LIMIT} is allowed")
    return root
