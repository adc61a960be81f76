"""Fidelity and diversity of a set of images, by nearest neighbours in a feature space.

precision, recall   Kynkäänniemi et al. 2019 (1904.06991)
density, coverage   Naeem et al. 2020 (2002.09797): robust where recall flatters a scattered sample

Shapes: N real images, M generated images, D feature dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist

from cluster.errors import DataError


@dataclass(frozen=True)
class Fidelity:
    """Each is a share in [0, 1], but density, which can exceed 1."""

    precision: float
    """Share of generated images inside some real image's ball."""
    recall: float
    """Share of real images inside some generated image's ball."""
    density: float
    """Mean number of real balls around a generated image, over k."""
    coverage: float
    """Share of real images with a generated image in their ball."""


def fidelity(real: np.ndarray, generated: np.ndarray, k: int = 5) -> Fidelity:
    """Compare (N, D) real with (M, D) generated features; balls reach to the k-th neighbour.

    Raises:
        DataError: a set has no more than k images.
    """
    if min(len(real), len(generated)) <= k:
        raise DataError(
            f"nearest neighbours with k = {k} need more than {k} images, found {len(real)} real "
            f"and {len(generated)} generated"
        )
    real_radius = _kth_distance(real, k)
    generated_radius = _kth_distance(generated, k)
    distance = cdist(real, generated)
    inside_real = distance < real_radius[:, None]
    return Fidelity(
        precision=float(inside_real.any(0).mean()),
        recall=float((distance < generated_radius).any(1).mean()),
        density=float(inside_real.sum(0).mean() / k),
        coverage=float(inside_real.any(1).mean()),
    )


def _kth_distance(features: np.ndarray, k: int) -> np.ndarray:
    """Distance of each row to its k-th nearest other row."""
    return np.partition(cdist(features, features), k, axis=1)[:, k]
