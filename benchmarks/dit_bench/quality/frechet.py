"""Fréchet distance between two sets of feature vectors, from moments gathered in one pass.

For Gaussians with means m and covariances C (Fréchet 1957; Dowson & Landau 1982; used on network
features by Heusel et al. 2017, arXiv 1706.08500):

    |m_a - m_b|² + tr(C_a) + tr(C_b) - 2 tr((C_a^½ C_b C_a^½)^½)

D is the number of features throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

# Errors relative to the largest eigenvalue. float64 leaves about 1e-13 at D = 1280.
_NEGATIVE_LIMIT = 1e-9
_ROOT_LIMIT = 1e-9
_SINGLE_LIMIT = 1e-5  # for covariances that were stored in float32


@dataclass(frozen=True)
class Statistics:
    """A mean (D,) and a covariance (D, D) that were computed elsewhere.

    count: how many vectors they were computed from; None if the file does not say.

    Raises ValueError for other shapes, numbers that are not finite, or a covariance that is not
    symmetric. Rounding to float32 can leave eigenvalues slightly below 0; these become 0.
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
    """Count, mean and covariance of a stream of vectors, in float64; N does not affect the memory.

    Partial sums are combined as by Chan, Golub & LeVeque (1979): the scatter is always taken about
    the current mean, so nothing is lost to cancellation as it would be in E[x²] - E[x]².
    """

    def __init__(self, width: int) -> None:
        """width: D, the features of one vector."""
        if width < 1:
            raise ValueError(f"width {width} is not a positive number of features")
        self.count = 0
        self.mean: Array = np.zeros(width)
        self._scatter: Array = np.zeros((width, width))

    @property
    def width(self) -> int:
        """D, the features of one vector."""
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
        if not len(rows):
            return
        mean = rows.mean(axis=0)
        centred, delta = rows - mean, mean - self.mean
        total = self.count + len(rows)
        between = np.outer(delta, delta) * (self.count * len(rows) / total)
        self._scatter += centred.T @ centred + between
        self.mean = self.mean + delta * (len(rows) / total)
        self.count = total

    @property
    def covariance(self) -> Array:
        """(D, D), divided by N - 1 as in FID's reference code. ValueError below two vectors."""
        if self.count < 2:
            raise ValueError(f"covariance of {self.count} vectors; at least 2 are needed")
        return self._scatter / (self.count - 1)


Gaussian = Moments | Statistics
"""What a Fréchet distance is taken of."""


def moments_of(features: ArrayLike) -> Moments:
    """Moments of an array (N, D)."""
    rows = np.asarray(features)
    if rows.ndim != 2:
        raise ValueError(f"features have shape {rows.shape}; (N, D) is needed")
    moments = Moments(rows.shape[1])
    moments.update(rows)
    return moments


def frechet_distance(
    a: Gaussian, b: Gaussian, *, allow_few: bool = False, title: str | None = None
) -> float:
    """The Fréchet distance of two sets (a squared distance, as FID is), at least 0.

    Args:
        allow_few: accept N ≤ D. The covariance is then singular and the distance says more about
            N than about the images, so without this it is an error.
        title: of a progress bar, since the roots take seconds at D = 2048; None shows no bar.

    Raises ValueError if the widths differ, a set is too small, or a covariance is not positive.
    """
    from dit_engine.console.bars import Bar

    if a.width != b.width:
        raise ValueError(f"features of width {a.width} and {b.width} cannot be compared")
    for moments in (a, b):
        if moments.count is not None and moments.count <= a.width and not allow_few:
            raise ValueError(
                f"{moments.count} images are too few for {a.width} features; "
                f"at least {a.width + 1} are needed (or allow_few)"
            )
    shift, covariances = a.mean - b.mean, (a.covariance, b.covariance)
    roots: list[Array] = []
    with Bar(total=3, desc=f"{title}: matrix square root", unit="part", leave=False,
             delay=bar_delay(a.width), disable=title is None) as bar:  # fmt: skip
        for covariance in covariances:
            roots.append(symmetric_sqrt(covariance))
            bar.update()
        # tr((a^½ b a^½)^½) is the sum of the singular values of a^½ b^½. The roots of the product's
        # eigenvalues have the same sum, but would enlarge the rounding errors of those near zero.
        overlap = float(np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum())
        bar.update()
    first, second = map(np.trace, covariances)
    # For equal sets, rounding can leave a value below 0.
    return max(float(shift @ shift + first + second - 2 * overlap), 0.0)


def bar_delay(width: int) -> float:
    """Seconds until a bar over work on (width, width) matrices is drawn: 0 if it is slow anyway."""
    return 0.0 if width >= 512 else 2.0


def symmetric_sqrt(matrix: Array) -> Array:
    """The symmetric square root (D, D) of a symmetric positive semi-definite matrix, checked.

    Raises ValueError if an eigenvalue is negative by more than rounding, or if the square of the
    root is not the matrix.
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
