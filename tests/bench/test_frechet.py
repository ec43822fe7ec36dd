"""Streaming moments against numpy, Fréchet distances against closed forms and scipy."""

from __future__ import annotations

import numpy as np
import pytest

from dit_bench.quality.frechet import (
    Moments,
    frechet_distance,
    moments_of,
    symmetric_sqrt,
    trace_sqrt_product,
)


def exact(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    """Moments that hold exactly these values: ±sqrt(D)·columns of a root, as 2·D vectors."""
    d = len(mean)
    root = np.linalg.cholesky(covariance)
    offsets = np.concatenate([root.T, -root.T]) * np.sqrt((2 * d - 1) / 2)
    return moments_of(mean + offsets)


def spd(rng: np.random.Generator, d: int) -> np.ndarray:
    a = rng.normal(size=(d, d))
    return a @ a.T / d + 0.1 * np.eye(d)


@pytest.mark.parametrize("splits", [[], [1], [500], [1, 2, 3, 999], [0, 0, 400, 400, 1000]])
def test_moments_equal_numpy_in_any_split(splits: list[int]) -> None:
    rows = np.random.default_rng(0).normal(size=(1000, 7)) * 3 + 50
    moments = Moments(7)
    for part in np.split(rows, splits):
        moments.update(part)
    assert moments.count == 1000
    np.testing.assert_allclose(moments.mean, rows.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance, np.cov(rows, rowvar=False), rtol=1e-11)


def test_a_mean_far_from_zero_costs_no_accuracy() -> None:
    """E[x²] - E[x]² would lose all sixteen digits here."""
    small = np.random.default_rng(2).integers(-4, 5, size=(4096, 3)).astype(np.float64)
    moments = Moments(3)
    for part in np.split(small + 2.0**30, 64):
        moments.update(part)
    np.testing.assert_allclose(moments.covariance, np.cov(small, rowvar=False), rtol=1e-6)


def test_float32_features_are_summed_in_float64() -> None:
    rows = (np.random.default_rng(3).normal(size=(20000, 4)) + 1000).astype(np.float32)
    expected = np.cov(rows.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(moments_of(rows).covariance, expected, rtol=1e-9, atol=1e-9)


def test_closed_form_diagonal() -> None:
    """Σ (m_a - m_b)² + Σ (σ_a - σ_b)²."""
    rng = np.random.default_rng(4)
    d = 40
    mean_a, mean_b = rng.normal(size=(2, d))
    sigma_a, sigma_b = rng.uniform(0.1, 3, size=(2, d))
    expected = ((mean_a - mean_b) ** 2).sum() + ((sigma_a - sigma_b) ** 2).sum()
    distance = frechet_distance(
        exact(mean_a, np.diag(sigma_a**2)), exact(mean_b, np.diag(sigma_b**2))
    )
    assert distance == pytest.approx(expected, rel=1e-10)


def test_closed_form_commuting() -> None:
    """Covariances with the same eigenvectors: the eigenvalues' roots subtract."""
    rng = np.random.default_rng(5)
    d = 30
    basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
    values_a, values_b = rng.uniform(0.01, 4, size=(2, d))
    mean = rng.normal(size=d)
    a, b = ((basis * values) @ basis.T for values in (values_a, values_b))
    expected = 9.0 * d + ((np.sqrt(values_a) - np.sqrt(values_b)) ** 2).sum()
    assert frechet_distance(exact(mean, a), exact(mean + 3, b)) == pytest.approx(expected, rel=1e-9)


def test_general_case_equals_scipy() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(6)
    a, b = spd(rng, 64), spd(rng, 64)
    expected = np.trace(linalg.sqrtm(a @ b)).real  # FID's form: the root of a·b, not symmetric
    assert trace_sqrt_product(a, b) == pytest.approx(expected, rel=1e-10)
    np.testing.assert_allclose(symmetric_sqrt(a), linalg.sqrtm(a).real, rtol=1e-9, atol=1e-11)
    mean = rng.normal(size=64)
    distance = frechet_distance(exact(mean, a), exact(0 * mean, b))
    assert distance == pytest.approx(mean @ mean + np.trace(a) + np.trace(b) - 2 * expected, 1e-9)


def test_equal_sets_are_at_zero_and_the_distance_is_symmetric() -> None:
    rng = np.random.default_rng(7)
    a = moments_of(rng.normal(size=(300, 50)))
    b = moments_of(rng.normal(size=(300, 50)) * 2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(a, b) > 50  # D·(2 - 1)² and more for the sampling error


def test_singular_covariances() -> None:
    """Fewer vectors than features: refused, or computed to rounding when asked for."""
    rng = np.random.default_rng(8)
    few = moments_of(rng.normal(size=(50, 50)))
    enough = moments_of(rng.normal(size=(51, 50)))
    with pytest.raises(ValueError, match=r"^50 images are too few for 50 features; at least 51"):
        frechet_distance(few, enough)
    with pytest.raises(ValueError, match="50 images"):
        frechet_distance(enough, few)
    assert frechet_distance(enough, enough) < 1e-10
    assert frechet_distance(few, few, allow_few=True) < 1e-6
    line = moments_of(np.outer(np.arange(10.0), [3.0, 4.0]))  # covariance of rank 1
    dot = moments_of(np.zeros((10, 2)))
    expected = 4.5**2 * 25 + np.var(np.arange(10.0), ddof=1) * 25
    assert frechet_distance(line, dot) == pytest.approx(expected, rel=1e-12)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"width 0"):
        Moments(0)
    with pytest.raises(ValueError, match=r"shape \(2, 3\); \(n, 4\)"):
        Moments(4).update(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="NaN"):
        Moments(2).update([[1.0, np.nan]])
    with pytest.raises(ValueError, match="width 2 and 3"):
        frechet_distance(Moments(2), Moments(3))
    with pytest.raises(ValueError, match="covariance of 1 vectors"):
        _ = moments_of([[1.0]]).covariance
    with pytest.raises(ValueError, match="eigenvalue -1"):
        symmetric_sqrt(np.diag([1.0, -1.0]))


def test_a_bar_shows_the_roots_at_once_where_they_are_slow(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = np.random.default_rng(0).standard_normal((600, 520))
    wide, narrow = moments_of(rows), moments_of(rows[:, :5])
    assert frechet_distance(narrow, narrow, title="FID") < 1e-9
    assert frechet_distance(wide, wide) < 1e-9
    assert capsys.readouterr().err == ""
    assert frechet_distance(wide, wide, title="FID") < 1e-9
    shown = capsys.readouterr().err
    assert "FID: matrix square root" in shown and "0/3" in shown
