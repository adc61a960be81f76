"""Statistics over seeds against their definitions and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from learner.miniature.study.statistics import corrected, holm, mean, paired


def test_the_interval_is_students() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    found = mean(values)
    assert found.value == 3
    assert found.half == pytest.approx(2.7764 * values.std(ddof=1) / 5**0.5, rel=1e-4)
    alone = mean(values[:1])
    assert (alone.value, np.isnan(alone.half)) == (1.0, True)


def test_policies_are_compared_seed_by_seed() -> None:
    policy, other = np.array([1.0, 3.0, 2.0, 5.0]), np.array([2.0, 4.0, 2.0, 4.0])
    found = paired(policy, other, lower_is_better=False)
    assert found.difference.value == pytest.approx(-0.25)
    assert (found.better, found.seeds) == (1, 4)  # a tie is not better
    assert found.p_value == pytest.approx(stats.ttest_rel(policy, other).pvalue)
    assert found.p_signs == pytest.approx(1.0)  # 1 of 3, two-sided
    lower = paired(policy, other, lower_is_better=True)
    assert (lower.better, lower.p_value) == (2, found.p_value)
    assert lower.difference == found.difference  # its sign is that of the values


def test_the_sign_test_of_ten_seeds() -> None:
    ahead = np.arange(1.0, 11.0)
    assert paired(ahead, 0 * ahead, lower_is_better=False).p_signs == pytest.approx(2 / 2**10)
    five = ahead[:5]
    assert paired(five, 0 * five, lower_is_better=False).p_signs == pytest.approx(2 / 2**5)


@pytest.mark.parametrize(("change", "p_value"), [(0.0, 1.0), (0.5, 0.0)])
def test_equal_differences(change: float, p_value: float) -> None:
    values = np.array([0.25, 0.5, 0.75])
    found = paired(values + change, values, lower_is_better=False)
    assert found.p_value == p_value
    assert np.isnan(paired(values[:1], values[:1], lower_is_better=False).p_value)


def test_holms_correction() -> None:
    # worked by hand: .01 x 4, .02 x 3, .03 x 2 = .06 < .06 stays, .04 x 1 -> .06
    assert holm([0.02, 0.01, 0.04, 0.03]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    with_none = holm([0.01, float("nan")])
    assert with_none[0] == pytest.approx(0.02)  # a test that cannot be made counts
    assert np.isnan(with_none[1])
    assert holm([]) == []


def test_comparisons_that_are_made_together() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=10)
    clear = paired(base + 1 + rng.normal(size=10) / 10, base, lower_is_better=False)
    weak = paired(base + rng.normal(size=10), base, lower_is_better=False)
    assert np.isnan(clear.p_holm)
    both = corrected([clear, weak])
    assert both[0].p_holm == pytest.approx(2 * clear.p_value)
    assert [each.significant for each in both] == [True, False]
    assert [each.improved for each in both] == [True, 2 * weak.better > 10]
