"""Options of the leave-one-out FID: length of the history and form of the reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.errors import DataError
from rewards.distribution.diagonal import Mode
from rewards.distribution.leave_one_out import Method
from rewards.distribution.moments import Covariance, decay_for, effective_images

PER_DIMENSION = 5  # effective images; rewards correlate .99 with those of an infinite history
FOR_VARIANCES = 1000  # effective images; the error of a variance is 5 %


@dataclass(frozen=True, kw_only=True)
class MomentsConfig:
    """The history behind the leave-one-out FID."""

    decay: float | None = None
    """Weight of the history in each update, [0, 1). A long history has less bias, a short one less
    lag: compare fid/ema with fid/batch. None: set by window."""
    window: float = 0.0
    """Weight of the history as an effective number of images, in place of decay. 0 without decay: 5
    images a feature dimension for the full covariance, else 1,000."""
    kind: Literal["ema", "sliding"] = "ema"
    """Kind of history. ema: exponential average. sliding: the newest images with equal weights,
    whose features stay in memory."""
    covariance: Covariance = "full"
    """Covariance of the features. full: the FID. diagonal: variances only, for windows too short
    for the full covariance."""
    method: Method = "exact"
    """Computation with the full covariance. exact: the definition. influence: its first order, to
    compare."""
    num_threads: int = 1
    """Threads of the moments server's linear algebra. More make decompositions of thousands of
    dimensions faster; the rewards' last bits then depend on the machine."""
    rebuild_every: int = 0
    """Unused, and removed in the next release: the moments server decomposes the history when the
    next iteration does not fit the old decomposition."""
    mode: Mode = "ema_loo"
    """Leave-one-out with the diagonal covariance. ema_loo: images are left out of history and batch
    together. loo_batch: of the batch only. ema_scalar: one reward for the whole batch."""

    def __post_init__(self) -> None:
        if self.covariance == "full" and self.mode != "ema_loo":
            raise ValueError(f"mode {self.mode!r} needs covariance=diagonal")
        if self.covariance == "diagonal" and self.method != "exact":
            raise ValueError(f"method {self.method!r} needs covariance=full")
        if self.num_threads < 1:
            raise ValueError(f"num_threads must be >= 1, found {self.num_threads}")
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), found {self.decay}")
        if not 0 <= self.window < float("inf"):
            raise ValueError(
                f"window must be a number of images, or 0 for decay; found {self.window}"
            )

    def effective_images(self, batch: float, dim: int) -> float:
        """Effective images of a long history, with `batch` images an iteration."""
        if self.window:
            return self.window
        if self.decay is not None:
            return effective_images(self.decay, batch)
        return max(PER_DIMENSION * dim if self.covariance == "full" else FOR_VARIANCES, batch)

    def decay_at(self, batch: int, dim: int) -> float:
        """The exponential average's decay for an iteration of `batch` images.

        Raises:
            DataError: the window is shorter than the iteration.
        """
        if not self.window and self.decay is not None:
            return self.decay
        try:
            return decay_for(self.effective_images(batch, dim), batch)
        except ValueError as error:
            raise DataError(
                f"{error}: set window to at least the images of an iteration ({batch})"
            ) from None
