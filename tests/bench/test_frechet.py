"""Streaming moments against numpy, Fréchet distances against closed forms and scipy; Inception
Score, precision and recall, and the bootstrap on cases whose outcome is known."""

from __future__ import annotations

import numpy as np
import pytest

from dit_bench.quality.frechet import (
    Moments,
    Statistics,
    frechet_distance,
    moments_of,
    symmetric_sqrt,
)
from dit_bench.quality.metrics import InceptionScore, precision_recall
from dit_bench.quality.paired import DistanceTo, paired_bootstrap, resampled


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


def score(probabilities: np.ndarray, split: int = 5000, parts: int = 1) -> float:
    found = InceptionScore(split)
    with np.errstate(divide="ignore"):
        for part in np.array_split(np.log(probabilities), parts):
            found.update(part)
    return found.value()


def test_inception_scores_of_known_distributions() -> None:
    assert score(np.full((50, 10), 0.1)) == pytest.approx(1, abs=1e-12)  # says nothing
    assert score(np.tile([0.7, 0.2, 0.1], (50, 1))) == pytest.approx(1, abs=1e-12)  # no variety
    assert score(np.eye(7)[np.arange(70) % 7]) == pytest.approx(7, rel=1e-12)  # sure, all classes
    assert score(np.eye(7)[np.arange(70) % 2]) == pytest.approx(2, rel=1e-12)


def test_inception_score_is_the_formula_over_splits_in_order() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(6), 1150)
    p[600:] = p[600:][np.argsort(p[600:, 0])]  # splits differ, so their order matters
    expected = []
    for start in range(0, 1150, 500):  # the last is shorter, and counts as much
        part = p[start : start + 500]
        divergence = (part * (np.log(part) - np.log(part.mean(0)))).sum(1)
        expected.append(np.exp(divergence.mean()))
    for parts in (1, 2, 7, 115):
        assert score(p, 500, parts) == pytest.approx(np.mean(expected), rel=1e-12)
    found = InceptionScore(500)
    found.update(np.log(p))
    assert (found.splits, found.count) == (3, 1150)
    with pytest.raises(ValueError, match="split 0"):
        InceptionScore(0)
    with pytest.raises(ValueError, match="no images"):
        InceptionScore().value()


def grid(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


def test_precision_and_recall_of_sets_made_by_hand() -> None:
    """Integers on a line, k = 1: every ball has radius 1."""
    reference = grid(0, 1, 2, 3)
    samples = grid(1.5, 2.5, 10, 10.25)  # of radius 1, 1, ¼, ¼
    precision, recall = precision_recall(reference, samples, k=1)
    assert precision == 0.5  # 1.5 and 2.5 are near the reference
    assert recall == 0.75  # 1, 2, 3 lie within 1 of them; 0 does not
    assert precision_recall(reference, reference, k=1) == (1, 1)
    assert precision_recall(reference, grid(50, 51, 52), k=1) == (0, 0)


def test_blocks_of_rows_do_not_matter_and_scipy_agrees() -> None:
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
    for rows in (7, 90, 4096):
        assert precision_recall(a, b, rows=rows) == pytest.approx(expected, abs=1e-12)


def test_too_few_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="3 images are too few for 3 neighbours"):
        precision_recall(grid(1, 2, 3, 4), grid(1, 2, 3))
    with pytest.raises(ValueError, match="width 1 and 2"):
        precision_recall(grid(1, 2, 3, 4), np.zeros((9, 2), np.float32))


def test_resampled_moments_are_those_of_the_repeated_rows() -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(40, 6)) + 5
    indices = rng.integers(0, 40, 40)
    found = resampled(rows, np.bincount(indices, minlength=40))
    np.testing.assert_allclose(found.mean, rows[indices].mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(rows[indices], rowvar=False), rtol=1e-10)
    assert found.count == 40


def test_the_quick_distance_is_the_exact_one() -> None:
    rng = np.random.default_rng(4)
    reference = moments_of(rng.normal(size=(100, 12)))
    other = moments_of(rng.normal(size=(80, 12)) @ np.diag(np.linspace(0.2, 2, 12)) + 0.3)
    expected = frechet_distance(other, reference)
    assert DistanceTo(reference)(other) == pytest.approx(expected, rel=1e-9)
    assert DistanceTo(reference)(reference) == pytest.approx(0, abs=1e-9)


def test_the_bootstrap_spreads_as_fresh_samples_do() -> None:
    """Standard deviation over resamples of one data set against that over many data sets."""
    rng = np.random.default_rng(6)
    reference = Statistics(np.zeros(3), np.eye(3))
    n = 400

    def pair() -> tuple[np.ndarray, np.ndarray]:
        b = rng.normal(size=(n, 3))
        return b + 0.5 + 0.2 * rng.normal(size=(n, 3)), b

    distance = DistanceTo(reference)
    fresh = []
    for _ in range(300):
        a, b = pair()
        fresh.append(distance(moments_of(a)) - distance(moments_of(b)))
    a, b = pair()
    draws = paired_bootstrap(a, b, reference, 300)
    assert np.std(draws) == pytest.approx(np.std(fresh), rel=0.25)
    # Means 0.5 apart in 3 features, and standard deviations of sqrt(1.04) against 1.
    true = 3 * 0.25 + 3 * (np.sqrt(1.04) - 1) ** 2
    low, high = np.quantile(draws, [0.005, 0.995])
    assert low < true < high and high - low < 0.8


def test_ctrl_c_keeps_the_finished_resamples() -> None:
    rows = np.random.default_rng(8).normal(size=(30, 2))
    reference = Statistics(np.zeros(2), np.eye(2))
    ticks = iter(range(100))

    def stop() -> None:
        if next(ticks) in (4, 5):
            raise KeyboardInterrupt

    assert len(paired_bootstrap(rows, rows + 1, reference, 100, tick=stop)) == 5
    assert len(paired_bootstrap(rows, rows + 1, reference, 100, tick=stop)) == 1  # not a second
    with pytest.raises(ValueError, match=r"\(30, 2\) and \(29, 2\) are not paired"):
        paired_bootstrap(rows, rows[1:], reference, 20)


def test_statistics_in_single_precision_are_taken() -> None:
    """Rounding to float32 leaves eigenvalues below 0, which are none of the file's making."""
    rng = np.random.default_rng(9)
    rows = rng.normal(size=(200, 3)) @ rng.normal(size=(3, 12))  # rank 3
    exact = moments_of(rows)
    rounded = exact.covariance.astype(np.float32)
    assert np.linalg.eigvalsh(rounded.astype(np.float64))[0] < -1e-9
    stored = Statistics(exact.mean.astype(np.float32), rounded)
    assert frechet_distance(stored, exact) == pytest.approx(0, abs=1e-3)
    wrong = Statistics(np.zeros(2), np.diag([1.0, -1.0]).astype(np.float32))
    with pytest.raises(ValueError, match="eigenvalue -1"):
        frechet_distance(wrong, wrong)
