"""Fidelity and diversity of a set of images, by nearest neighbours in a feature space.

precision, recall   Kynkäänniemi et al. 2019 (1904.06991)
density, coverage   Naeem et al. 2020 (2002.09797): robust where recall flatters a scattered sample

Shapes: N real images, M generated images, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from cluster.errors import DataError
from rewards.metrics.pairs import Points, distances, scale_of


@dataclass(frozen=True)
class Neighbourhoods:
    """Which images lie in balls around images of the other set; balls reach to the k-th nearest
    other image of their own set, and are open."""

    around: np.ndarray
    """(M,) int64, number of real balls around each generated image."""
    near: np.ndarray
    """(N,) bool, whether a real image is inside some generated image's ball."""
    covered: np.ndarray
    """(N,) bool, whether some generated image is inside a real image's ball."""
    near_alone: np.ndarray
    """(M,) int64, number of real images that are in a generated image's ball and in no other's."""
    covered_alone: np.ndarray
    """(M,) int64, number of real balls around a generated image and around no other."""
    k: int

    @property
    def precision(self) -> float:
        """Share of generated images inside some real image's ball."""
        return float((self.around > 0).mean())

    @property
    def recall(self) -> float:
        """Share of real images inside some generated image's ball."""
        return int(self.near.sum()) / len(self.near)

    @property
    def density(self) -> float:
        """Mean number of real balls around a generated image, over k; can exceed 1."""
        return float(self.around.mean() / self.k)

    @property
    def coverage(self) -> float:
        """Share of real images with a generated image in their ball."""
        return int(self.covered.sum()) / len(self.covered)


def neighbourhoods(
    real: np.ndarray, generated: np.ndarray, k: int, real_radius: np.ndarray | None = None
) -> Neighbourhoods:
    """Compare (N, D) real with (M, D) generated features.

    Args:
        real_radius: `kth_distances(real, k)`, where several sets are compared with the same.

    Raises:
        DataError: a set has no more than k images.
    """
    if min(len(real), len(generated)) <= k:
        raise DataError(
            f"nearest neighbours with k = {k} need more than {k} images, found {len(real)} real "
            f"and {len(generated)} generated"
        )
    centre = real.mean(0, dtype=np.float64)
    scale = scale_of(centre, real, generated)
    ours, theirs = (Points.of(each, centre, scale) for each in (generated, real))
    real_radius = _kth_distances(theirs, k) if real_radius is None else real_radius
    generated_radius = _kth_distances(ours, k)
    around, near_alone, covered_alone = np.zeros((3, len(generated)), np.int64)
    near, covered = np.zeros((2, len(real)), bool)
    for at, products in theirs.products(ours):
        row, column = _closer(products, real_radius[at, None], theirs, at, ours)
        around += np.bincount(column, minlength=len(generated))
        covered[at.start + row] = True
        covered_alone += _alone(row, column, len(generated))
        row, column = _closer(products, generated_radius[None], theirs, at, ours)
        near[at.start + row] = True
        near_alone += _alone(row, column, len(generated))
    return Neighbourhoods(around, near, covered, near_alone, covered_alone, k)


def _alone(row: np.ndarray, column: np.ndarray, columns: int) -> np.ndarray:
    """(columns,) number of rows whose only pair is with a column."""
    return np.bincount(column[np.bincount(row)[row] == 1], minlength=columns)


def kth_distances(features: np.ndarray, k: int) -> np.ndarray:
    """(N,) float64 distance of each row of (N, D) to its k-th nearest other row."""
    centre = features.mean(0, dtype=np.float64)
    return _kth_distances(Points.of(features, centre, scale_of(centre, features)), k)


def nearest(features: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k of (N, D) features that are nearest to each of (M, D) queries.

    Returns:
        (M, k) their rows, nearest first, and (M, k) float64 distances; fewer columns where there
        are fewer features.
    """
    k = min(k, len(features))
    centre = features.mean(0, dtype=np.float64)
    scale = scale_of(centre, features, queries)
    ours, theirs = (Points.of(each, centre, scale) for each in (queries, features))
    rows, found = np.empty((len(queries), k), np.int64), np.empty((len(queries), k))
    for at, columns, apart in _nearest(ours, theirs, k):
        rows[at], found[at] = columns, apart
    return rows, found


def _kth_distances(points: Points, k: int) -> np.ndarray:
    radius = np.empty(len(points))
    for at, _, apart in _nearest(points, points, k + 1):  # the first is the point itself, or equal
        radius[at] = apart[:, k]
    return radius


def _nearest(
    queries: Points, points: Points, k: int
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Some queries, and (R, k) columns and distances of their nearest points, in order."""
    for at, products in queries.products(points):
        kth = torch.topk(torch.from_numpy(products), k).values[:, -1:].numpy()
        # the error of the k-th largest is no more than the largest error, and so is a product's
        low, _ = _fp32(kth - 2 * (queries.errors[at, None] + points.errors.max()), kth)
        row, column = np.divmod(np.flatnonzero(products >= low), len(points))
        exact = distances(queries.features[at], row, points.features, column)
        order = np.lexsort((column, exact, row))
        firsts = np.searchsorted(row[order], np.arange(len(products)))
        taken = order[firsts[:, None] + np.arange(k)]
        yield at, column[taken], exact[taken]


def _closer(
    products: np.ndarray, radius: np.ndarray, left: Points, at: slice, right: Points
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pairs whose distance is less than a radius.

    Args:
        products: (R, M) of the points `at` of `left`, and all of `right`.
        radius: broadcast to (R, M).
    """
    bound = -np.square(radius * left.scale) / 2
    low, _ = _fp32(bound - left.errors[at, None].max() - right.errors.max(), bound)
    row, column = np.divmod(np.flatnonzero(products > low), products.shape[1])
    gap = products[row, column] - np.broadcast_to(bound, products.shape)[row, column]
    error = left.errors[at][row] + right.errors[column]
    inside = gap > error
    check = np.flatnonzero(np.abs(gap) <= error)
    exact = distances(left.features[at], row[check], right.features, column[check])
    reach = np.broadcast_to(radius, products.shape)[row[check], column[check]]
    inside[check] = exact < reach
    return row[inside], column[inside]


def _fp32(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds as float32, rounded outwards."""
    below, above = low.astype(np.float32), high.astype(np.float32)
    return np.nextafter(below, -np.inf), np.nextafter(above, np.inf)
