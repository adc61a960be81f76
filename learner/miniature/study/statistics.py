"""Statistics over seeds: means with intervals, paired tests, correction for their number.

Two policies of one seed share networks, judge and random numbers, so their figures are compared in
pairs. All functions take one value a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

LEVEL = 0.05


@dataclass(frozen=True)
class Mean:
    """A mean with half the width of its 95 % interval (Student's t), NaN for one value."""

    value: float
    half: float


def mean(values: np.ndarray) -> Mean:
    """Mean of (n,) values."""
    if len(values) < 2:
        return Mean(float(values.mean()), float("nan"))
    half = stats.t.ppf(1 - LEVEL / 2, len(values) - 1) * stats.sem(values)
    return Mean(float(values.mean()), float(half))


@dataclass(frozen=True)
class Paired:
    """A policy compared with another in one figure."""

    difference: Mean
    """Policy minus the other."""
    better: int
    """Seeds in which the policy is better; a tie is not."""
    seeds: int
    p_value: float
    """Two-sided, of the paired t-test."""
    p_signs: float
    """Two-sided, of the sign test, without ties. Of five seeds it is at least .06, of ten .002."""
    p_holm: float = float("nan")
    """`p_value` corrected for the number of comparisons."""

    @property
    def significant(self) -> bool:
        return self.p_holm < LEVEL

    @property
    def improved(self) -> bool:
        """Whether most seeds are better."""
        return 2 * self.better > self.seeds


def paired(policy: np.ndarray, other: np.ndarray, *, lower_is_better: bool) -> Paired:
    """Compare (n,) values of a policy with those of another, seed by seed."""
    change = np.asarray(policy, dtype=np.float64) - other
    gain = -change if lower_is_better else change
    better, worse = int((gain > 0).sum()), int((gain < 0).sum())
    signs = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    return Paired(
        difference=mean(change),
        better=better,
        seeds=len(change),
        p_value=_t_test(change),
        p_signs=float(signs),
    )


def _t_test(change: np.ndarray) -> float:
    """Two-sided p-value of a mean of 0. Equal differences have none but 0 or 1; one seed has
    none."""
    if len(change) < 2:
        return float("nan")
    if not change.std() > 1e-12 * np.abs(change).max():
        return float(not change.any())
    return float(stats.ttest_1samp(change, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979), in the given order: the k-th smallest of m values is multiplied by
    m - k + 1, and is no smaller than those before it. NaN counts as a test and stays NaN."""
    order = np.argsort(p_values)  # NaN last
    corrected, largest = [float("nan")] * len(p_values), 0.0
    for rank, index in enumerate(order):
        value = p_values[index] * (len(p_values) - rank)
        if not np.isnan(value):
            largest = max(largest, min(value, 1.0))
            corrected[index] = largest
    return corrected


def corrected(comparisons: Sequence[Paired]) -> list[Paired]:
    """Comparisons that are made together, with `p_holm`."""
    values = holm([each.p_value for each in comparisons])
    return [replace(each, p_holm=value) for each, value in zip(comparisons, values)]
