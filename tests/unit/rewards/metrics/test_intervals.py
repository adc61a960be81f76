"""Bootstrap intervals against t intervals, brute-force jackknives, and their own coverage."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from rewards.distribution.fid import frechet_distance
from rewards.distribution.moments import Moments
from rewards.distribution.reference import Reference
from rewards.metrics import frechet
from rewards.metrics.frechet import frechet_estimate, moments_of
from rewards.metrics.inception_score import inception_score
from rewards.metrics.intervals import (
    Difference,
    Estimate,
    Figure,
    differences,
    intervals,
    mean_estimate,
)


def interval(estimate: Estimate, resamples: int = 2000, seed: int = 0) -> Figure:
    return intervals({"x": estimate}, resamples, seed)["x"]


def difference(first: Estimate, second: Estimate, *, paired: bool, seed: int = 0) -> Difference:
    return differences({"x": first}, {"x": second}, {"images": paired}, 500, seed)["x"]


@pytest.mark.parametrize("count", [5, 20, 200])
def test_the_interval_of_a_mean_is_students(count: int) -> None:
    """For symmetric values; plain quantiles of resamples would be 30 % too narrow for five."""
    values = scipy.stats.norm.ppf((np.arange(count) + 0.5) / count) + 3
    found = interval(mean_estimate(values, "images"), 20_000)
    expected = scipy.stats.t.interval(0.95, count - 1, 3, values.std(ddof=1) / count**0.5)
    assert found.value == pytest.approx(3)
    assert (found.low, found.high) == pytest.approx(expected, abs=0.08 * (expected[1] - 3))


def test_the_interval_of_a_share_stays_within_0_and_1() -> None:
    found = interval(mean_estimate(np.arange(50) > 0, "images"))
    assert 0.9 < found.low < found.value < found.high <= 1


def test_one_unit_or_no_units_have_no_interval() -> None:
    assert np.isnan(interval(mean_estimate(np.ones(1), "images")).low)
    assert np.isnan(interval(Estimate(3.0)).high)


def fid(x: np.ndarray, reference: Reference) -> float:
    moments = Moments.from_features(x)
    return frechet_distance(moments.mean, moments.cov, reference.mu, reference.sigma)


@pytest.mark.parametrize(("count", "dim"), [(40, 5), (12, 20)])
def test_influences_of_the_fid_are_its_jackknife(count: int, dim: int) -> None:
    generator = np.random.default_rng(0)
    x, reference = generator.normal(size=(count, dim)), Reference(np.zeros(dim), np.eye(dim))
    without = np.array([fid(np.delete(x, at, 0), reference) for at in range(count)])
    expected = (count - 1) * (without.mean() - without)
    found = frechet_estimate(x, reference)
    assert found.value == fid(x, reference)
    assert found.influences == pytest.approx(expected, abs=1e-6 * expected.std())


def test_influences_of_the_inception_score_are_its_jackknife() -> None:
    """Of each split; three splits of unequal size."""
    logits = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
    found, order = inception_score(logits, 3), np.random.RandomState(2020).permutation(32)
    assert found.influences is not None
    for rows in (order[:10], order[10:21], order[21:]):
        count = len(rows)
        without = [inception_score(logits[np.delete(rows, at)], 1).value for at in range(count)]
        expected = (count - 1) * (np.mean(without) - without) * 32 / (3 * count)
        assert found.influences[rows] == pytest.approx(expected, abs=1e-5)


def test_features_in_blocks_are_the_same_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(2, size=(50, 6)).astype(np.float32)
    plain, reference = Moments.from_features(x), Reference(np.zeros(6), np.eye(6))
    whole, one = frechet_estimate(x, reference), moments_of(x)
    assert (one.mean == plain.mean).all()
    assert (one.cov == plain.cov).all()
    monkeypatch.setattr(frechet, "HELD", 6 * 7)
    parts, several = frechet_estimate(x, reference), moments_of(x)
    assert several.cov == pytest.approx(plain.cov, rel=1e-12, abs=1e-13)
    assert parts.value == pytest.approx(whole.value, rel=1e-12)
    assert parts.influences == pytest.approx(whole.influences, abs=1e-9)


@pytest.mark.parametrize(("count", "dim", "least", "most"), [(150, 8, 0.9, 1), (40, 32, 0.93, 1)])
def test_the_fids_interval_covers_the_mean_of_other_sets(
    count: int, dim: int, least: float, most: float
) -> None:
    """95 % of intervals hold the FID that sets of as many images have on average, bias included;
    percentiles of resampled sets' FIDs hold it in 75 % of the first and none of the second (60 sets
    each, 2026-11-29). With few images for the dimensions the jackknife errs on the wide side."""
    generator = np.random.default_rng(0)
    reference = Reference(np.zeros(dim), np.eye(dim))

    def draw() -> np.ndarray:
        return generator.normal(0.2, 1.1, size=(count, dim))

    truth = np.mean([fid(draw(), reference) for _ in range(500)])
    found = [interval(frechet_estimate(draw(), reference), 200, at) for at in range(150)]
    covered = np.mean([each.low <= truth <= each.high for each in found])
    assert least <= covered <= most


def test_p_values_are_below_a_twentieth_where_the_interval_excludes_0() -> None:
    generator, seen = np.random.default_rng(0), set()
    for at in range(60):
        values = generator.normal(at / 60, size=(2, 12))
        first, second = (mean_estimate(each, "images") for each in values)
        for paired in (True, False):
            found = difference(first, second, paired=paired, seed=at)
            excludes = found.low > 0 or found.high < 0
            if abs(found.p_value - 0.05) > 0.008:  # quantiles interpolate
                assert (found.p_value < 0.05) == excludes
                seen.add(excludes)
    assert seen == {True, False}


@pytest.mark.parametrize("paired", [True, False])
def test_sets_of_one_policy_differ_by_chance_as_often_as_they_should(paired: bool) -> None:
    generator = np.random.default_rng(0)
    sets = generator.normal(size=(150, 2, 30))
    low = [
        difference(*(mean_estimate(each, "images") for each in pair), paired=paired, seed=at)
        for at, pair in enumerate(sets)
    ]
    assert 0.01 <= np.mean([found.p_value < 0.05 for found in low]) <= 0.1


def test_pairs_find_what_sets_apart_do_not() -> None:
    generator = np.random.default_rng(0)
    common = generator.normal(size=200)
    first = mean_estimate(common + 0.1 * generator.normal(size=200), "images")
    second = mean_estimate(common + 0.05 + 0.1 * generator.normal(size=200), "images")
    together, apart = (difference(first, second, paired=paired) for paired in (True, False))
    assert together.value == apart.value
    assert together.p_value < 0.01
    assert apart.p_value > 0.1
    assert together.high - together.low < (apart.high - apart.low) / 5


def test_a_set_compared_with_itself() -> None:
    same = mean_estimate(np.arange(9.0), "images")
    found = difference(same, same, paired=True)
    assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)
