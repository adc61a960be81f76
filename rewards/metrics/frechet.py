"""FID and sFID of features, with the influence of every image.

Shapes: N images, D feature dimensions, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.linalg
import torch

from cluster.errors import DataError
from rewards.distribution.fid import distance_with_factor, significant
from rewards.distribution.moments import Moments, check_features
from rewards.distribution.reference import Reference
from rewards.distribution.root_trace import Mixture, trace_drops
from rewards.metrics.intervals import Estimate

HELD = 1 << 23  # features in float64 at a time: 64 MiB


def frechet_estimate(
    features: np.ndarray, reference: Reference, *, ddof: int = 0, influences: bool = True
) -> Estimate:
    """FID of (N, D) features against a reference.

    Args:
        ddof: the features' covariance is divided by N - ddof, as the reference's is: 1 for files
            of FID tools, 0 for moments that Tessera computed.
        influences: compute them, too; about as long again.

    Raises:
        DataError: features that are not (N, D) or not finite, or fewer than two.
    """
    count = len(features)
    if count < 2:
        raise DataError(f"a Fréchet distance needs at least 2 images, found {count}")
    moments = moments_of(features)
    cov = moments.cov * (count / (count - ddof)) if ddof else moments.cov
    trace = float(np.trace(reference.sigma))
    value = distance_with_factor(moments.mean, cov, reference.mu, trace, reference.factor)
    if not influences:
        return Estimate(value)
    return Estimate(value, "images", frechet_influences(features, moments, reference))


def frechet_influences(features: np.ndarray, moments: Moments, reference: Reference) -> np.ndarray:
    """(N,) jackknife pseudo-values of the FID, centred: N - 1 times its drop without the image.

    As `leave_one_out_fid` of a batch without history, up to a constant, in blocks of images.
    """
    count = len(features)
    share, factor = 1 / (count - 1), reference.factor
    squares = factor.T @ moments.cov @ factor * (count * share)
    spectrum, vectors = scipy.linalg.eigh((squares + squares.T) / 2)
    keep = significant(spectrum)
    values = spectrum[keep]
    onto = factor @ (vectors[:, keep] * np.sqrt(share / values))
    found = np.empty(count)
    for rows, x in blocks(features):
        scores = (x - moments.mean) @ onto
        rest = np.clip(1 - (1 + share) * np.square(scores).sum(1), 0, 1)
        parts = [torch.from_numpy(array) for array in (values, scores, rest)]
        mixture = Mixture(parts[0], parts[1], parts[2], share)
        drops = trace_drops(mixture).numpy()
        found[rows] = np.square(x - reference.mu).sum(1) - 2 * drops / share
    return found - found.mean()


def moments_of(features: np.ndarray) -> Moments:
    """`Moments.from_features` in blocks; the same bits where one block holds all."""
    count = float(len(features))
    mean = sum(x.sum(0) for _, x in blocks(features)) / count
    cov = np.zeros((len(mean), len(mean)))
    for _, x in blocks(features):
        centred = x - mean
        cov += centred.T @ centred
    return Moments(mean=mean, cov=cov / count, weight=count, square_weight=count)


def blocks(features: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of (N, D) features, and them as float64, checked."""
    size = max(HELD // max(features.shape[-1], 1), 1)
    for at in range(0, max(len(features), 1), size):
        yield slice(at, at + size), check_features(features[at : at + size])
