"""Diagnostics of the distribution reward: bias of few images, window length, lag, classes.

Shapes: N images, D feature dimensions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cluster.errors import DataError
from rewards.distribution.reference import Reference

LAG_SHARE, LAG_COMMITS = 0.5, 10  # lag (share of the FID) and commits before a warning
NEEDED_PER_DIMENSION = 2  # effective images: below, leave-one-out rewards are mostly bias


def bias_constant(reference: Reference, covariance: str = "full") -> float:
    """c such that an FID from n images is about c / n too high, in FID units times images.

    To second order, for Gaussian features of the reference's own distribution, population
    covariance of the sample, and an exact reference with eigenvalues s_k:

        c = sum_k s_k + 1/2 sum_jk (1 + [j = k]) s_j s_k / (s_j + s_k)

    The first sum is E|mean error|^2 * n. The second is the second-order term of
    tr (S^1/2 C S^1/2)^1/2, whose second differential in the eigenbasis is
    -1/2 sum_jk D_jk^2 / (s_j s_k (s_j + s_k)), with the variance of a sample covariance,
    E D_jk^2 = (1 + [j = k]) (s_j s_k)^2 / n. First-order terms cancel. For S = I it is
    D + D (D + 1) / 4. That FID falls with 1/n to its limit is known (Chong and Forsyth 2020,
    1911.07023), who fit c; this is its value. Simulated (D 64 and 256, spectra 1 and 1/k): within
    10 % from n = 2 D up; at n = D / 2, a quarter too low.

    With covariance "diagonal", D independent variances: c = 3/2 tr S.
    """
    if covariance == "diagonal":
        return 1.5 * float(np.trace(reference.sigma))
    values = (reference.factor**2).sum(0)  # its columns are scaled eigenvectors
    pairs = values[:, None] * (values / (values[:, None] + values))
    return float(values.sum() + (pairs.sum() + np.trace(pairs)) / 2)


def short_window_warning(effective: float, reference: Reference) -> str:
    """Warning for a history of too few effective images; empty if they are enough."""
    dim = reference.factor.shape[1]
    needed = NEEDED_PER_DIMENSION * dim
    if effective >= needed:
        return ""
    return (
        f"the history holds about {effective:.0f} images for a full covariance of {dim} "
        f"dimensions: below {needed} the leave-one-out rewards are mostly the bias of few images. "
        f"Set a window of {needed} or more, draw more images an iteration, choose features of "
        "fewer dimensions, or covariance=diagonal"
    )


def few_images_warning(reference: Reference, covariance: str = "full") -> str:
    """Warning for a reference of fewer images than dimensions; empty if they are enough, or if
    their number is unknown."""
    if covariance != "full" or reference.images < 0:
        return ""
    return few_images(reference.source or "the reference", reference.images, reference.dim)


def few_images(source: str, images: int, dim: int) -> str:
    """Warning for moments of fewer real images than dimensions; else empty."""
    if images > dim:
        return ""
    return (
        f"{source} has {images} images, which give no full covariance in {dim} dimensions: every "
        "distance to it is too high. More images help, or features of fewer dimensions"
    )


def lag_warning(fid: float, batch_fid: float) -> str:
    """Warning for a history that lags behind the policy."""
    return (
        f"the history lags behind the policy: for {LAG_COMMITS} iterations more than "
        f"{LAG_SHARE:.0%} of its FID (now {fid:.3g}) was not in the newest images (now "
        f"{batch_fid:.3g}, with the bias of few), so rewards speak of an older policy. Lower the "
        "learning rate, draw more images an iteration, or shorten the window"
    )


def class_statistics(rewards: np.ndarray, classes: np.ndarray) -> dict[str, Any]:
    """Means and deviations of rewards by class: fields of `DistributionReward`; empty without any
    class.

    Args:
        rewards: (N,), NaN for failed images.
        classes: (N,) int; below 0 for images without a class (captions).

    Raises:
        DataError: not one integer an image.
    """
    if classes.shape != rewards.shape or classes.dtype.kind not in "iu":
        raise DataError(
            f"classes must be {len(rewards)} integers, one an image, found {classes.dtype} of "
            f"shape {classes.shape}"
        )
    counted = np.isfinite(rewards) & (classes >= 0)
    if not counted.any():
        return {}
    values = rewards[counted]
    kinds, index = np.unique(classes[counted], return_inverse=True)
    means = np.bincount(index, values) / np.bincount(index)
    return {
        "class_rewards": {int(kind): float(mean) for kind, mean in zip(kinds, means)},
        "between_classes": float(means.std()),
        "within_classes": float(np.sqrt(np.mean((values - means[index]) ** 2))),
    }
