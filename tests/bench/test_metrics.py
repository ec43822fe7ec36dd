"""Moments, distances, Inception Score, precision and recall, and the bootstrap over pairs, against
numpy, scipy and formulas."""

from __future__ import annotations

import numpy as np
import pytest

from dit_bench.quality.metrics import (
    Statistics,
    frechet_distance,
    inception_score,
    moments_of,
    precision_recall,
    symmetric_sqrt,
)
from dit_bench.quality.paired import distances_to, interval, paired_bootstrap, resampled


def test_moments_of_parts_equal_numpy() -> None:
    """Far from zero, where E[x²] - E[x]² would lose all sixteen digits."""
    small = np.random.default_rng(2).integers(-4, 5, size=(4000, 3)).astype(np.float64)
    found = moments_of(small + 2.0**30, rows=64)
    assert found.count == 4000
    np.testing.assert_allclose(found.mean - 2.0**30, small.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found.covariance, np.cov(small, rowvar=False), rtol=1e-6)
    with pytest.raises(ValueError, match="NaN"):
        moments_of([[1.0, np.nan]])


def test_the_distance_equals_scipys() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(6)
    a, b = (x @ x.T / 64 + 0.1 * np.eye(64) for x in rng.normal(size=(2, 64, 64)))
    expected = np.trace(linalg.sqrtm(a @ b)).real  # FID's form: the root of a·b, not symmetric
    np.testing.assert_allclose(symmetric_sqrt(a), linalg.sqrtm(a).real, rtol=1e-9, atol=1e-11)
    mean = rng.normal(size=64)
    distance = frechet_distance(Statistics(mean, a), Statistics(0 * mean, b))
    assert distance == pytest.approx(mean @ mean + np.trace(a) + np.trace(b) - 2 * expected, 1e-9)


def test_singular_covariances() -> None:
    """Fewer vectors than features: refused, or computed to rounding when asked for."""
    rng = np.random.default_rng(8)
    few = moments_of(rng.normal(size=(50, 50)))
    enough = moments_of(rng.normal(size=(51, 50)))
    for pair in ((few, enough), (enough, few)):
        with pytest.raises(ValueError, match=r"^50 images are too few for 50 features; at least 5"):
            frechet_distance(*pair)
    assert frechet_distance(enough, enough) < 1e-10
    assert frechet_distance(few, few, allow_few=True) < 1e-6
    line = moments_of(np.outer(np.arange(10.0), [3.0, 4.0]))  # covariance of rank 1
    dot = moments_of(np.zeros((10, 2)))
    expected = 4.5**2 * 25 + np.var(np.arange(10.0), ddof=1) * 25
    assert frechet_distance(line, dot) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="width 2 and 50"):
        frechet_distance(line, few)
    with pytest.raises(ValueError, match="1 images are too few"):
        frechet_distance(moments_of([[1.0]]), moments_of([[1.0]]), allow_few=True)
    with pytest.raises(ValueError, match="eigenvalue -1"):
        symmetric_sqrt(np.diag([1.0, -1.0]))


def test_inception_score_is_the_formula_over_splits_in_order() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(6), 1150)
    p[600:] = p[600:][np.argsort(p[600:, 0])]  # splits differ, so their order matters
    expected = []
    for start in range(0, 1150, 500):  # the last is shorter, and counts as much
        part = p[start : start + 500]
        divergence = (part * (np.log(part) - np.log(part.mean(0)))).sum(1)
        expected.append(np.exp(divergence.mean()))
    assert inception_score(np.log(p), 500) == pytest.approx(np.mean(expected), rel=1e-12)
    with np.errstate(divide="ignore"):
        sure = np.log(np.eye(7)[np.arange(70) % 2])  # two of seven classes, and zeros
    assert inception_score(sure) == pytest.approx(2, rel=1e-12)


def test_precision_and_recall_are_the_definition_whatever_the_blocks() -> None:
    distance = pytest.importorskip("scipy.spatial.distance")
    rng = np.random.default_rng(2)
    a = rng.normal(size=(90, 5)).astype(np.float32) + 20
    b = (rng.normal(size=(70, 5)) * 1.3 + 20).astype(np.float32)

    def radii(x: np.ndarray) -> np.ndarray:
        return np.sort(distance.cdist(x, x), axis=1)[:, 3]

    d = distance.cdist(b.astype(float), a.astype(float))
    expected = ((d <= radii(a.astype(float))).any(1).mean(),
                (d <= radii(b.astype(float))[:, None]).any(0).mean())  # fmt: skip
    assert 0.1 < expected[0] < 0.99 and 0.1 < expected[1] < 0.99
    for rows in (7, 4096):
        assert precision_recall(a, b, rows=rows) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="3 images are too few for 3 neighbours"):
        precision_recall(a, b[:3])


def test_moments_and_distances_of_resamples_are_the_exact_ones() -> None:
    rng = np.random.default_rng(3)
    rows, reference = rng.normal(size=(40, 6)) + 5, moments_of(rng.normal(size=(100, 6)))
    indices = rng.integers(0, 40, 40)
    found, expected = resampled(rows, np.bincount(indices, minlength=40)), moments_of(rows[indices])
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-10, atol=1e-12)
    assert found.count == 40
    distance = frechet_distance(expected, reference)
    assert distances_to(reference)(found) == pytest.approx(distance, rel=1e-9)


def test_the_bootstrap_spreads_as_fresh_samples_do() -> None:
    """Standard deviation over resamples of one data set against that over many data sets."""
    rng = np.random.default_rng(6)
    reference = Statistics(np.zeros(3), np.eye(3))
    distance = distances_to(reference)

    def pair() -> tuple[np.ndarray, np.ndarray]:
        b = rng.normal(size=(400, 3))
        return b + 0.5 + 0.2 * rng.normal(size=(400, 3)), b

    fresh = [
        distance(moments_of(a)) - distance(moments_of(b)) for a, b in (pair() for _ in range(300))
    ]
    draws = paired_bootstrap(*pair(), reference, 300)
    assert np.std(draws) == pytest.approx(np.std(fresh), rel=0.25)
    # Means 0.5 apart in 3 features, and standard deviations of sqrt(1.04) against 1.
    true = 3 * 0.25 + 3 * (np.sqrt(1.04) - 1) ** 2
    low, high = np.quantile(draws, [0.005, 0.995])
    assert low < true < high and high - low < 0.8


def test_the_interval_holds_what_other_samples_would_give() -> None:
    """Few vectors of many features: resampling then moves a Fréchet distance by more than its
    spread, which must not move the interval."""
    rng = np.random.default_rng(0)
    d, n, trials = 12, 24, 80
    reference = Statistics(np.zeros(d), np.eye(d))
    distance = distances_to(reference)

    def pair() -> tuple[np.ndarray, np.ndarray, float]:
        b = rng.normal(size=(n, d))
        a = 1.3 * b + 0.05 * rng.normal(size=(n, d))
        return a, b, distance(moments_of(a)) - distance(moments_of(b))

    expected = np.mean([pair()[2] for _ in range(2000)])
    held, held_by_percentiles = 0, 0
    for trial in range(trials):
        a, b, value = pair()
        draws = paired_bootstrap(a, b, reference, 100, seed=trial)
        low, high = interval(draws, value)
        assert low <= value <= high
        held += low <= expected <= high
        low, high = np.quantile(draws, [0.025, 0.975])
        held_by_percentiles += low <= expected <= high
    assert held / trials > 0.85
    assert held_by_percentiles < held
