"""Mean and covariance of feature vectors: mergeable, with exponential forgetting, float64.

Stored as (mean, population covariance, weight): the difference of raw moments, E[xx'] - E[x]E[x]',
loses digits that leave-one-out rewards need. `m1` and `m2` give the raw moments. `MomentSums` are
raw sums about a shared point; they merge in any order with the rounding error of deviations.

The length of a history is an effective number of images: image weights w_i are worth
(sum w)^2 / sum w^2 equally weighted images (Kish 1965); an exponential average of batches of N with
decay b is worth N (1 + b) / (1 - b).

Shapes: N images, D feature dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import msgpack
import numpy as np

from cluster.errors import CheckpointError, DataError
from cluster.io.checksum import UNREADABLE, add_checksum, verify_checksum

Covariance = Literal["full", "diagonal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """First and second moments of a weighted set of feature vectors."""

    mean: np.ndarray
    """(D,) float64"""
    cov: np.ndarray
    """(D, D) float64, population covariance (divided by the weight, not the weight minus one)."""
    weight: float
    """Number of images, or 1 for an exponential average; below 1 while an average that started
    empty fills up; 0 if empty."""
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

    @classmethod
    def empty(cls, dim: int) -> Moments:
        """Moments of no images.

        An exponential average that starts here is debiased by its accumulated weight, as Adam's
        moments are (1412.6980, section 3): the first update gives the batch's moments.
        """
        return cls(mean=np.zeros(dim), cov=np.zeros((dim, dim)), weight=0.0, square_weight=0.0)

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
        """Equivalent number of equally weighted images (Kish); 0 if empty."""
        return self.weight**2 / self.square_weight if self.weight else 0.0

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together; associative and commutative."""
        if self.dim != other.dim:
            raise DataError(f"cannot merge moments of {self.dim} and {other.dim} dimensions")
        return _mix(self, self.weight, other, other.weight, self.weight + other.weight)

    def history_share(self, decay: float) -> float:
        """Share of this history in an update with `decay`: the decay, or less while an average that
        started empty fills up."""
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), found {decay}")
        if self.weight >= 1:
            return decay
        return decay * self.weight / (decay * self.weight + 1 - decay)

    def update(self, features: np.ndarray, decay: float) -> Moments:
        """Exponential average: decay of this, 1 - decay of the batch's moments; total weight 1.

        While an average that started empty fills up (weight w < 1), the history counts decay * w:
        the result is the debiased average, of weight decay * w + 1 - decay.
        """
        self.history_share(decay)  # checks decay
        batch = Moments.from_features(features)
        if self.weight >= 1:
            return _mix(self, decay, batch, 1 - decay, 1.0)
        history = decay * self.weight
        return _mix(self, history, batch, 1 - decay, history + 1 - decay)

    def normalised(self) -> Moments:
        """The same moments, of weight 1 for an average that still fills up: updating these with
        `history_share` as decay is updating the original."""
        if self.weight >= 1 or self.weight == 0:
            return self
        return replace(self, weight=1.0, square_weight=self.square_weight / self.weight**2)

    def to_bytes(self) -> bytes:
        """msgpack with a checksum; read back by `from_bytes`."""
        return add_checksum(
            msgpack.packb(
                {
                    "dim": self.dim,
                    "mean": self.mean.tobytes(),
                    "cov": self.cov.tobytes(),
                    "weight": self.weight,
                    "square_weight": self.square_weight,
                }
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Moments:
        """Inverse of `to_bytes`, bit for bit.

        Raises:
            CheckpointError: not moments, or damaged.
        """
        try:
            outer = msgpack.unpackb(data)
            if "fields" in outer:  # the former name, in older checkpoints
                data = msgpack.packb({"sha256": outer["sha256"], "body": outer["fields"]})
            fields = msgpack.unpackb(verify_checksum(data))
            dim = fields["dim"]
            return cls(
                mean=np.frombuffer(fields["mean"]).reshape(dim).copy(),
                cov=np.frombuffer(fields["cov"]).reshape(dim, dim).copy(),
                weight=fields["weight"],
                square_weight=fields["square_weight"],
            )
        except UNREADABLE as error:
            raise CheckpointError(f"these are not stored moments: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentSums:
    """Sums of deviations from a shared point; parts merge in any order.

    A shift near the mean (the reference's, or the first batch's) keeps the digits that sums of
    large features would lose.
    """

    shift: np.ndarray
    """(D,) float64; the same for all parts."""
    weight: float
    """Number of images."""
    total: np.ndarray
    """(D,) float64, sum of x - shift."""
    outer: np.ndarray
    """(D, D) float64, sum of (x - shift)(x - shift)'."""

    @classmethod
    def about(cls, shift: np.ndarray) -> MomentSums:
        """Sums of no images, about a shift (D,)."""
        shift = np.asarray(shift, dtype=np.float64)
        dim = len(shift)
        return cls(shift=shift, weight=0.0, total=np.zeros(dim), outer=np.zeros((dim, dim)))

    def add(self, features: np.ndarray) -> MomentSums:
        """These sums and (N, D) more images.

        Raises:
            DataError: not two-dimensional, empty, not finite, or of other dimensions.
        """
        x = check_features(features)
        if x.shape[1] != len(self.shift):
            raise DataError(f"cannot add {x.shape[1]} dimensions to sums of {len(self.shift)}")
        x = x - self.shift
        return replace(
            self,
            weight=self.weight + len(x),
            total=self.total + x.sum(0),
            outer=self.outer + x.T @ x,
        )

    def merge(self, other: MomentSums) -> MomentSums:
        """
        Raises:
            DataError: the parts have different shifts (merge their `moments` instead).
        """
        if not np.array_equal(self.shift, other.shift):
            raise DataError("sums about different shifts do not add up: merge their moments")
        return replace(
            self,
            weight=self.weight + other.weight,
            total=self.total + other.total,
            outer=self.outer + other.outer,
        )

    def moments(self) -> Moments:
        """Mean and population covariance of all images."""
        if not self.weight:
            return Moments.empty(len(self.shift))
        gap = self.total / self.weight
        return Moments(
            mean=self.shift + gap,
            cov=self.outer / self.weight - np.outer(gap, gap),
            weight=self.weight,
            square_weight=self.weight,
        )


@dataclass(frozen=True)
class SlidingWindow:
    """The newest images with equal weights; the oldest batch is dropped when the others suffice.

    Stores features, which are smaller than moments for batches of N < D images. Moments are summed
    again, D^2 operations an image; subtracting dropped batches would accumulate rounding errors.
    """

    batches: tuple[np.ndarray, ...] = ()
    """(N, D) features each, oldest first."""

    @property
    def dim(self) -> int:
        """D; 0 of an empty window."""
        return self.batches[0].shape[1] if self.batches else 0

    @property
    def effective_size(self) -> float:
        """Images in the window."""
        return float(sum(len(batch) for batch in self.batches))

    def push(self, features: np.ndarray, images: float) -> SlidingWindow:
        """The window with (N, D) new features.

        Args:
            images: the window's length; whole batches are kept, so it holds at least this many
                (once that many came).

        Raises:
            DataError: not two-dimensional, empty, not finite, or of other dimensions.
        """
        check_features(features)
        batches = (*self.batches, np.array(features))
        if batches[0].shape[1] != features.shape[1]:
            raise DataError(
                f"the window holds features of {batches[0].shape[1]} dimensions, found "
                f"{features.shape[1]}"
            )
        count = sum(len(batch) for batch in batches)
        while count - len(batches[0]) >= images and len(batches) > 1:
            count -= len(batches[0])
            batches = batches[1:]
        return SlidingWindow(batches)

    def moments(self) -> Moments:
        """Moments of all images in the window.

        Raises:
            DataError: there are none.
        """
        if not self.batches:
            raise DataError("the window is empty")
        sums = MomentSums.about(self.batches[0].mean(0, dtype=np.float64))
        for batch in self.batches:
            sums = sums.add(batch)
        return sums.moments()


def effective_images(decay: float, batch: float) -> float:
    """Effective number of images of a long exponential average: N (1 + b) / (1 - b).

    Args:
        decay: b in [0, 1).
        batch: N, images of each update.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), found {decay}")
    return batch * (1 + decay) / (1 - decay)


def decay_for(effective_images: float, batch: float) -> float:
    """Inverse of `effective_images`.

    Raises:
        ValueError: fewer effective images than a batch has.
    """
    if not 0 < batch <= effective_images < math.inf:
        raise ValueError(
            f"an average over batches of {batch:g} images cannot hold {effective_images:g} "
            "effective ones: it holds at least one batch"
        )
    return (effective_images - batch) / (effective_images + batch)


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
    if a.weight == 0 or b.weight == 0:
        alone = b if a.weight == 0 else a
        square = alone.square_weight * (weight / alone.weight) ** 2 if alone.weight else 0.0
        return replace(alone, weight=weight, square_weight=square)
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
