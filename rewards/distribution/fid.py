"""The Fréchet distance of two Gaussians (Heusel et al. 2017, 1706.08500).

    F = |mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)

The last trace is computed as tr (L' S_a L)^(1/2) with S_b = L L': eigenvalues of a symmetric matrix
are real and accurate; `sqrtm` of the product is neither.

Shapes: N images, D feature dimensions.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

NOISE_MARGIN = 4.0
NOISE_ULPS = 50  # at most; symmetric eigensolvers stay within some sqrt(D)


def covariance_factor(cov: np.ndarray) -> np.ndarray:
    """L (D, R) with L L' = cov, without eigenvalues that are rounding noise."""
    values, vectors = scipy.linalg.eigh(cov)
    keep = significant(values)
    return vectors[:, keep] * np.sqrt(values[keep])


def significant(values: np.ndarray) -> np.ndarray:
    """Mask of eigenvalues (D,) of a covariance that stand above rounding noise."""
    return values > noise(values, NOISE_MARGIN)


def noise(values: np.ndarray, margin: float = 1.0) -> float:
    """Size of the rounding error in computed eigenvalues (D,) of a covariance.

    The most negative computed eigenvalue times a margin, since true ones are not negative; at least
    the eigensolver's error.
    """
    ulps = min(len(values), NOISE_ULPS) * np.finfo(np.float64).eps
    return float(max(ulps * values.max(initial=0), -margin * values.min(initial=0)))


def frechet_distance(
    mu_a: np.ndarray, cov_a: np.ndarray, mu_b: np.ndarray, cov_b: np.ndarray
) -> float:
    """Fréchet distance of N(mu_a, cov_a) and N(mu_b, cov_b), in squared feature units; >= 0."""
    factor = covariance_factor(cov_b)
    return distance_with_factor(mu_a, cov_a, mu_b, float(np.trace(cov_b)), factor)


def distance_with_factor(
    mean: np.ndarray, cov: np.ndarray, mu: np.ndarray, trace: float, factor: np.ndarray
) -> float:
    values = scipy.linalg.eigvalsh(factor.T @ cov @ factor) if factor.size else np.zeros(0)
    root_trace = np.sqrt(values[significant(values)]).sum()
    gap = mean - mu
    return max(float(gap @ gap + np.trace(cov) + trace - 2 * root_trace), 0.0)
