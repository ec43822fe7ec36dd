"""Inception Score, precision and recall, and the bootstrap on cases whose outcome is known."""

from __future__ import annotations

import numpy as np
import pytest

from dit_bench.quality.frechet import Statistics, frechet_distance, moments_of
from dit_bench.quality.metrics import InceptionScore, precision_recall
from dit_bench.quality.paired import DistanceTo, paired_bootstrap, resampled


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


def test_collapse_costs_recall_and_noise_costs_precision() -> None:
    rng = np.random.default_rng(1)
    reference = rng.normal(size=(300, 4)).astype(np.float32)
    narrow = 0.02 * rng.normal(size=(300, 4)).astype(np.float32)
    wide = 8 * rng.normal(size=(300, 4)).astype(np.float32)
    precision, recall = precision_recall(reference, narrow)
    assert precision > 0.95 and recall < 0.05
    precision, recall = precision_recall(reference, wide)
    assert precision < 0.1 and recall > 0.5


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


def test_pairs_that_do_not_differ_have_no_interval() -> None:
    rows = np.random.default_rng(5).normal(size=(60, 4)).astype(np.float32)
    reference = Statistics(np.zeros(4), np.eye(4))
    draws = paired_bootstrap(rows, rows, reference, 20)
    assert draws.shape == (20,) and (draws == 0).all()


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


def test_pairing_narrows_the_interval() -> None:
    rng = np.random.default_rng(7)
    b = rng.normal(size=(300, 3))
    a = b + 0.01 * rng.normal(size=(300, 3))
    reference = Statistics(np.ones(3), np.eye(3))
    paired = np.std(paired_bootstrap(a, b, reference, 50))
    apart = np.std(paired_bootstrap(a, b[rng.permutation(300)], reference, 50))
    assert paired < apart / 20


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
