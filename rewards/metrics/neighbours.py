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
class Fidelity:
    """Shares in [0, 1], except density, which can exceed 1."""

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
    real_radius = _kth_distances(real, k)
    generated_radius = _kth_distances(generated, k)
    centre = real.mean(0, dtype=np.float64)
    covered, near, around = 0, 0, np.zeros(len(generated), np.int64)
    for rows, squares, slack in _squared_distances(real, generated, centre):
        reach = real_radius[rows, None]
        inside = _below(squares, reach, slack, real[rows], generated)
        around += inside.sum(0)
        covered += int(inside.any(1).sum())
        inside = _below(squares, generated_radius[None], slack, real[rows], generated)
        near += int(inside.any(1).sum())
    return Fidelity(
        precision=float((around > 0).mean()),
        recall=near / len(real),
        density=float(around.mean() / k),
        coverage=covered / len(real),
    )


def _kth_distances(features: np.ndarray, k: int) -> np.ndarray:
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
