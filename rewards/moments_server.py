"""The moments-server role: one owner of the EMA moments, which commits every iteration once."""

from __future__ import annotations

import time
from dataclasses import dataclass

import msgpack
import numpy as np
from threadpoolctl import threadpool_limits

from cluster.errors import CheckpointError, DataError
from cluster.messages import Span
from rewards.fid import Reference, distance_to_reference
from rewards.leave_one_out import leave_one_out_fid
from rewards.moments import Moments


@dataclass(frozen=True, kw_only=True)
class MomentsConfig:
    """The moving average behind the leave-one-out FID."""

    decay: float = 0.5
    """Weight of the history in each update, [0, 1). Long against the bias of few images, short
    against the policy's drift: watch fid/ema beside fid/batch."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), found {self.decay}")


@dataclass(frozen=True, kw_only=True)
class DistributionReward:
    """The moments server's answer for one iteration."""

    iteration: int
    rewards: np.ndarray
    """(N,) float64, FID units; NaN for images that were left out."""
    fid: float
    """FID of the mixture of history and batch."""
    batch_fid: float
    """FID of this iteration's images alone; far above `fid` with few images, but free of lag."""
    effective_size: float
    """How many images' worth of information the mixture holds."""
    spans: tuple[Span, ...] = ()


class MomentsServer:
    """Holds reference and EMA moments.

    A commit is keyed by its iteration: repeating the last one returns the same answer and changes
    nothing, so a caller that lost the answer may ask again.
    """

    def __init__(self, config: MomentsConfig, name: str = "moments-server") -> None:
        self.name = name
        self._decay = config.decay
        self._reference: Reference | None = None
        self._moments: Moments | None = None
        self._committed = -1  # the last iteration whose images are in the moments
        self._answer: DistributionReward | None = None

    def set_reference(self, reference: Reference, fingerprint: str) -> None:
        """Set the real images' moments.

        Raises:
            DataError: the reference was made with another feature network.
        """
        if reference.fingerprint and reference.fingerprint != fingerprint:
            raise DataError(
                f"the reference was made with features {reference.fingerprint!r}, but the reward "
                f"servers use {fingerprint!r}: build the reference again with this network"
            )
        self._reference = reference

    def seed(self, features: np.ndarray) -> float:
        """Start the moving average from images of the base policy, (N, D); returns their FID."""
        with threadpool_limits(1):
            self._moments = Moments.from_features(features)
            return self._fid(self._moments)

    def commit(self, iteration: int, features: np.ndarray, valid: np.ndarray) -> DistributionReward:
        """Judge one iteration's images and take them into the moving average, once.

        Args:
            iteration: must follow the last one, or repeat it.
            features: (N, D) float32.
            valid: (N,) bool; images that failed are left out of rewards and moments.

        Raises:
            DataError: an iteration out of order, or fewer than two valid images.
        """
        start = time.time()
        if self._answer is not None and iteration == self._committed:
            return self._answer
        if iteration <= self._committed:
            raise DataError(
                f"iteration {iteration} comes after {self._committed} was committed: "
                "moments cannot go back"
            )
        if self._moments is None or self._reference is None:
            raise DataError("the moments server needs a reference and seeded moments first")
        used = features[valid]
        rewards = np.full(len(features), np.nan)
        # One thread: the last bits of a product then do not depend on where the server runs.
        with threadpool_limits(1):
            rewards[valid], fid = leave_one_out_fid(
                used, self._moments, self._reference, self._decay
            )
            moments = self._moments.update(used, self._decay)
            batch_fid = self._fid(Moments.from_features(used))
        self._moments, self._committed = moments, iteration
        self._answer = DistributionReward(
            iteration=iteration,
            rewards=rewards,
            fid=fid,
            batch_fid=batch_fid,
            effective_size=moments.effective_size,
            spans=(Span(self.name, "moments", start, time.time()),),
        )
        return self._answer

    def state(self) -> bytes:
        """Everything a checkpoint needs: moments, and the iteration they were committed for."""
        if self._moments is None:
            raise DataError("the moments server has no moments yet")
        return msgpack.packb({"moments": self._moments.to_bytes(), "iteration": self._committed})

    def restore(self, state: bytes) -> None:
        """Inverse of `state`; the next commit must be a later iteration."""
        try:
            fields = msgpack.unpackb(state)
            iteration, moments = int(fields["iteration"]), Moments.from_bytes(fields["moments"])
        except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
            raise CheckpointError(f"this is no state of a moments server: {error}") from error
        self._moments, self._committed, self._answer = moments, iteration, None

    def _fid(self, moments: Moments) -> float:
        if self._reference is None:
            raise DataError("the moments server needs a reference first")
        return distance_to_reference(moments.mean, moments.cov, self._reference)
