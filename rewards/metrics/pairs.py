"""Distances of many pairs, by matrix products in fp32 whose errors are bounded.

A product gives -d^2 / 2 of each pair, within an error that follows from the points' distances to a
centre. What depends on more digits is decided by `distances`, in float64 from the differences: any
comparison of distances comes out as it does there.

Shapes: N, M points, D dimensions, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

HELD = 1 << 25  # products in memory at a time: 128 MiB
EXACT = 4096  # pairs in float64 at a time
UNIT = 2.0**-24  # rounding of fp32
LEAST = 1e-30  # products below are lost; the largest are about 1


@dataclass(frozen=True)
class Points:
    """Features as deviations from a centre, divided by a power of two."""

    features: np.ndarray
    """(N, D) as given."""
    rows: np.ndarray
    """(N, D + 2) float32: deviations x, then -x^2 / 2, then 1."""
    errors: np.ndarray
    """(N,) float64; products of points i and j are within errors[i] + errors[j]."""
    scale: float
    """A distance times this is one of `rows`."""

    @classmethod
    def of(cls, features: np.ndarray, centre: np.ndarray, scale: float) -> Points:
        """
        Args:
            centre: (D,) float64 near the points, against cancellation.
            scale: from `scale_of`, common to all points.
        """
        count, dim = features.shape
        rows, halves = np.ones((count, dim + 2), np.float32), np.empty(count)
        for at in slices(count, EXACT):
            x = (features[at] - centre) * scale
            halves[at] = np.square(x).sum(1) / 2
            rows[at, :dim] = x
        rows[:, dim] = -halves
        # A sum of D + 2 products in any order (Higham 2002, section 3.1), whose terms add up to at
        # most x^2 + y^2, and the rounding of what goes in.
        share = 2 * 1.01 * (dim + 8) * UNIT
        return cls(features, rows, share * halves + LEAST, scale)

    def __len__(self) -> int:
        return len(self.rows)

    def products(self, other: Points) -> Iterator[tuple[slice, np.ndarray]]:
        """Some rows and their (R, M) float32 products with all of the other points: minus half the
        squared scaled distances."""
        for at in slices(len(self), max(HELD // len(other), 1)):
            ours = self.rows[at].copy()
            ours[:, -2:] = self.rows[at, -1:-3:-1]
            yield at, ours @ other.rows.T


def scale_of(centre: np.ndarray, *sets: np.ndarray) -> float:
    """The power of two that brings all points of the (N, D) sets within 1 of the centre."""
    farthest = max(
        np.square(features[at] - centre).sum(1).max() ** 0.5
        for features in sets
        for at in slices(len(features), EXACT)
    )
    return float(2.0 ** -np.ceil(np.log2(farthest))) if farthest else 1.0


def distances(
    left: np.ndarray, row: np.ndarray, right: np.ndarray, column: np.ndarray
) -> np.ndarray:
    """(P,) distances of pairs of rows, in float64, reproducible for a pair."""
    found = np.empty(len(row))
    for at in slices(len(row), EXACT):
        gaps = np.subtract(left[row[at]], right[column[at]], dtype=np.float64)
        found[at] = np.sqrt(np.square(gaps).sum(1))
    return found


def slices(length: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, length)) for at in range(0, length, size))
