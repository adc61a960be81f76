"""Mean and covariance of feature vectors: mergeable, with exponential forgetting, float64.

Stored as (mean, population covariance, weight) rather than as raw moments: E[xx'] - E[x]E[x]' loses
digits that leave-one-out rewards need. `m1` and `m2` give the raw moments.

Shapes: N images, D feature dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgpack
import numpy as np

from cluster.errors import CheckpointError, DataError

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """First and second moments of a weighted set of feature vectors."""

    mean: np.ndarray
    """(D,) float64"""
    cov: np.ndarray
    """(D, D) float64, population covariance (divided by the weight, not the weight minus one)."""
    weight: float
    """Number of images, or 1 for an exponential average."""
    square_weight: float
    """Sum of the squared image weights: `effective_size` is weight^2 / square_weight."""

    @classmethod
    def from_features(cls, features: np.ndarray) -> Moments:
        """Moments of (N, D) features, each image of weight 1.

        Raises:
            DataError: not two-dimensional, empty, or not finite.
        """
        x = check_features(features)
        centred = x - (mean := x.mean(0))
        count = float(len(x))
        return cls(mean=mean, cov=centred.T @ centred / count, weight=count, square_weight=count)

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def m1(self) -> np.ndarray:
        """Raw first moment E[x], (D,)."""
        return self.mean

    @property
    def m2(self) -> np.ndarray:
        """Raw second moment E[xx'], (D, D)."""
        return self.cov + np.outer(self.mean, self.mean)

    @property
    def effective_size(self) -> float:
        """How many equally weighted images hold as much information (Kish)."""
        return self.weight**2 / self.square_weight

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together; associative and commutative."""
        if self.dim != other.dim:
            raise DataError(f"cannot merge moments of {self.dim} and {other.dim} dimensions")
        return _mix(self, self.weight, other, other.weight, self.weight + other.weight)

    def update(self, features: np.ndarray, decay: float) -> Moments:
        """Exponential average: decay of this, 1 - decay of the batch's moments; total weight 1."""
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), found {decay}")
        return _mix(self, decay, Moments.from_features(features), 1 - decay, 1.0)

    def to_bytes(self) -> bytes:
        """msgpack; read back by `from_bytes`."""
        return msgpack.packb(
            {
                "format": FORMAT,
                "dim": self.dim,
                "mean": self.mean.tobytes(),
                "cov": self.cov.tobytes(),
                "weight": self.weight,
                "square_weight": self.square_weight,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Moments:
        """Inverse of `to_bytes`, bit for bit.

        Raises:
            CheckpointError: not moments, or of a format this version does not know.
        """
        try:
            fields = msgpack.unpackb(data)
            if fields["format"] != FORMAT:
                raise ValueError(f"format {fields['format']}, expected {FORMAT}")
            dim = fields["dim"]
            return cls(
                mean=np.frombuffer(fields["mean"]).copy(),
                cov=np.frombuffer(fields["cov"]).reshape(dim, dim).copy(),
                weight=fields["weight"],
                square_weight=fields["square_weight"],
            )
        except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
            raise CheckpointError(f"these are not stored moments: {error}") from error


def check_features(features: np.ndarray) -> np.ndarray:
    """(N, D) finite features as float64.

    Raises:
        DataError: says what was found.
    """
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or x.size == 0:
        raise DataError(f"features must be a non-empty (N, D) array, found shape {x.shape}")
    if not np.isfinite(x).all():
        rows = np.flatnonzero(~np.isfinite(x).all(1))
        raise DataError(f"features of {len(rows)} of {len(x)} images are not finite: {rows[:5]}")
    return x


def _mix(a: Moments, weight_a: float, b: Moments, weight_b: float, weight: float) -> Moments:
    """Law of total covariance for the mixture (weight_a a + weight_b b) / (weight_a + weight_b)."""
    share_a, share_b = weight_a / (weight_a + weight_b), weight_b / (weight_a + weight_b)
    gap = b.mean - a.mean
    square = (share_a / a.weight) ** 2 * a.square_weight + (
        share_b / b.weight
    ) ** 2 * b.square_weight
    return Moments(
        mean=share_a * a.mean + share_b * b.mean,
        cov=share_a * a.cov + share_b * b.cov + share_a * share_b * np.outer(gap, gap),
        weight=weight,
        square_weight=square * weight**2,
    )
