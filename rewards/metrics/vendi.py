"""In-class diversity: the Vendi score (Friedman and Dieng 2022, 2210.02410) of each condition.

The exponential of the entropy of the eigenvalues of K / n, K the cosine similarities of n images:
the effective number of different images, from 1 (all alike) to n.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from rewards.metrics.intervals import Estimate, mean_estimate


def vendi_estimate(features: np.ndarray, conditions: np.ndarray) -> Estimate | None:
    """Mean Vendi score over the conditions that have several images.

    Args:
        features: (N, D).
        conditions: (N,) integers, equal for images of one condition.

    Returns:
        None where no condition has two images.
    """
    order = np.argsort(conditions, kind="stable")
    _, starts = np.unique(conditions[order], return_index=True)
    groups = [rows for rows in np.split(order, starts[1:]) if len(rows) > 1]
    if not groups:
        return None
    return mean_estimate(np.array([vendi_score(features[rows]) for rows in groups]), "conditions")


def vendi_score(features: np.ndarray) -> float:
    """Vendi score of (n, D) features with the cosine kernel."""
    x = features.astype(np.float64)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    x /= np.where(norms > 0, norms, 1)
    kernel = x @ x.T if len(x) <= x.shape[1] else x.T @ x  # the same eigenvalues but zeros
    values = scipy.linalg.eigvalsh(kernel / len(x))
    values = values[values > 0]
    return float(np.exp(-(values * np.log(values)).sum()))
