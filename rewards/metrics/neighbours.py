"""Fidelity and diversity of a set of images, by nearest neighbours in a feature space.

precision, recall   Kynkäänniemi et al. 2019 (1904.06991)
density, coverage   Naeem et al. 2020 (2002.09797): robust where recall flatters a scattered sample

Shapes: N real images, M generated images, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cluster.errors import DataError

HELD = 1 << 24  # distances in memory at a time: 128 MiB
COLUMNS = 4096  # features in float64 at a time
PRECISION = 1e-12  # of a squared distance by a matrix product, relative to the squared norms


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
    real: np.ndarray, generated: np.ndarray, k: int = 5, real_radius: np.ndarray | None = None
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
    real_radius = kth_distances(real, k) if real_radius is None else real_radius
    generated_radius = kth_distances(generated, k)
    centre = real.mean(0, dtype=np.float64)
    around = np.zeros(len(generated), np.int64)
    near, covered = np.zeros((2, len(real)), bool)
    for rows, squares, slack in _squared_distances(real, generated, centre):
        reach = real_radius[rows, None]
        inside = _below(squares, reach, slack, real[rows], generated)
        around += inside.sum(0)
        covered[rows] = inside.any(1)
        inside = _below(squares, generated_radius[None], slack, real[rows], generated)
        near[rows] = inside.any(1)
    return Neighbourhoods(around, near, covered, k)


def fidelity(real: np.ndarray, generated: np.ndarray, k: int = 5) -> dict[str, float]:
    """precision, recall, density and coverage of `neighbourhoods`."""
    found = neighbourhoods(real, generated, k)
    return {
        "precision": found.precision,
        "recall": found.recall,
        "density": found.density,
        "coverage": found.coverage,
    }


def kth_distances(features: np.ndarray, k: int) -> np.ndarray:
    """(N,) distance of each row to its k-th nearest other row."""
    radius = np.empty(len(features))
    centre = features.mean(0, dtype=np.float64)
    for rows, squares, slack in _squared_distances(features, features, centre):
        kth = np.partition(squares, k, axis=1)[:, k, None]
        below = (squares < kth - slack).sum(1)  # certainly nearer; the next are computed exactly
        row, column = np.nonzero(np.abs(squares - kth) <= slack)
        exact = _distances(features[rows], row, features, column)
        order = np.lexsort((exact, row))
        firsts = np.searchsorted(row[order], np.arange(len(squares)))
        radius[rows] = exact[order][firsts + k - below]
    return radius


def nearest(features: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k of (N, D) features that are nearest to each of (M, D) queries.

    Returns:
        (M, k) their rows, nearest first, and (M, k) float64 distances.
    """
    k = min(k, len(features))
    rows, distances = np.empty((len(queries), k), np.int64), np.empty((len(queries), k))
    centre = features.mean(0, dtype=np.float64)
    for at, squares, _ in _squared_distances(queries, features, centre):
        chosen = np.argsort(squares, axis=1, kind="stable")[:, :k]
        query = np.repeat(np.arange(len(squares)), k)
        exact = _distances(queries[at], query, features, chosen.ravel()).reshape(chosen.shape)
        order = np.argsort(exact, axis=1, kind="stable")
        rows[at] = np.take_along_axis(chosen, order, axis=1)
        distances[at] = np.take_along_axis(exact, order, axis=1)
    return rows, distances


def _squared_distances(
    left: np.ndarray, right: np.ndarray, centre: np.ndarray
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Squared distances of some rows of `left` (N, D) to all of `right` (M, D), as matrix products.

    Args:
        centre: (D,) near the points, against cancellation.

    Yields:
        The rows, their squared distances (R, M) and error bounds (R, M); use `_distances` where an
        error matters.
    """
    norms = np.concatenate(
        [np.square(right[at] - centre).sum(1) for at in _slices(len(right), COLUMNS)]
    )
    size = max(HELD // len(right), 1)
    for rows in _slices(len(left), size):
        ours = left[rows] - centre
        sums = np.square(ours).sum(1)[:, None] + norms
        squares = np.concatenate(
            [ours @ (right[at] - centre).T for at in _slices(len(right), COLUMNS)], axis=1
        )
        squares *= -2
        squares += sums
        sums *= PRECISION
        yield rows, squares, sums


def _below(
    squares: np.ndarray, bound: np.ndarray, slack: np.ndarray, left: np.ndarray, right: np.ndarray
) -> np.ndarray:
    """(R, M) bool: whether distances are below a bound (broadcast to (R, M))."""
    square_bound = np.square(bound)
    inside = squares < square_bound
    row, column = np.nonzero(np.abs(squares - square_bound) <= slack)
    exact = _distances(left, row, right, column)
    inside[row, column] = exact < np.broadcast_to(bound, squares.shape)[row, column]
    return inside


def _distances(
    left: np.ndarray, row: np.ndarray, right: np.ndarray, column: np.ndarray
) -> np.ndarray:
    """(P,) exact distances of pairs of rows, reproducible for a pair."""
    found = np.empty(len(row))
    for at in _slices(len(row), COLUMNS):
        gaps = np.subtract(left[row[at]], right[column[at]], dtype=np.float64)
        found[at] = np.sqrt(np.square(gaps).sum(1))
    return found


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, length)) for at in range(0, length, size))
