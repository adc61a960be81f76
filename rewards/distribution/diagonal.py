"""The diagonal leave-one-out FID: single features without correlations, as in 2603.23086's code.

    F(m, v) = |mu_r - m|^2 + |sd_r - sqrt(v + EPSILON)|^2

After bugrabaran/ar-policy-tuning at fac5b31 (`utils/reward_utils.py`, default decay .5).
Departures: the history is debiased (theirs starts halved), and variances follow the law of total
variance, since E[x^2] - E[x]^2 loses digits.

Shapes: N images, D dimensions.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from rewards.distribution.moments import Moments
from rewards.distribution.reference import Reference

Mode = Literal["ema_loo", "loo_batch", "ema_scalar"]

EPSILON = 1e-12  # added to the generated variances only


def diagonal_rewards(
    x: np.ndarray, moments: Moments, reference: Reference, decay: float, mode: Mode = "ema_loo"
) -> tuple[np.ndarray, float]:
    """Rewards (N,) float64 of features x (N, D) float64, N >= 2, and the FID of the mixture.

    Args:
        moments: history; not changed.
        decay: the history's weight in [0, 1).
        mode: "ema_loo" leaves images out of the mixture; "loo_batch" out of the batch alone, whose
            FID it returns; "ema_scalar" gives all images F(history) - F(mixture).

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {get_args(Mode)}, found {mode!r}")
    target = _target(reference)
    past = moments.mean, np.maximum(moments.cov.diagonal(), 0)
    kept = 0.0 if mode == "loo_batch" else decay
    mean, variance = x.mean(0), x.var(0)
    fid = float(_distance(*_mix(*past, kept, mean, variance), *target))
    if mode == "ema_scalar":
        return np.full(len(x), float(_distance(*past, *target)) - fid), fid

    # Without image i: the mean moves by -d/(N-1), the variance is v N/(N-1) - d^2 N/(N-1)^2.
    count, deviations = len(x), x - mean
    without = np.maximum(variance - deviations**2 / (count - 1), 0) * (count / (count - 1))
    left = _mix(*past, kept, mean - deviations / (count - 1), without)
    return _distance(*left, *target) - fid, fid


def diagonal_distance(mean: np.ndarray, cov: np.ndarray, reference: Reference) -> float:
    """F of a mean (D,) and the diagonal of a covariance (D, D)."""
    return float(_distance(mean, np.maximum(cov.diagonal(), 0), *_target(reference)))


def _target(reference: Reference) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviations of the reference, (D,) each."""
    return reference.mu, np.sqrt(np.maximum(reference.sigma.diagonal(), 0))


def _mix(
    mean_a: np.ndarray,
    variance_a: np.ndarray,
    share_a: float,
    mean_b: np.ndarray,
    variance_b: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance, each (..., D), of the mixture share_a a + (1 - share_a) b."""
    share_b = 1 - share_a
    between = share_a * share_b * (mean_a - mean_b) ** 2
    return (
        share_a * mean_a + share_b * mean_b,
        share_a * variance_a + share_b * variance_b + between,
    )


def _distance(
    mean: np.ndarray, variance: np.ndarray, mu: np.ndarray, deviation: np.ndarray
) -> np.ndarray:
    """(...) diagonal Fréchet distances of (..., D) to the reference."""
    return ((mu - mean) ** 2 + (deviation - np.sqrt(variance + EPSILON)) ** 2).sum(-1)
