"""The result of the moments server for an iteration, and its form in a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cluster.io.checksum import pack_array, unpack_array
from cluster.spans import Span


@dataclass(frozen=True, kw_only=True)
class DistributionReward:
    """Distribution rewards of one iteration, with diagnostics."""

    iteration: int
    rewards: np.ndarray
    """(N,) float64, FID units; NaN for excluded images."""
    fid: float
    """FID of the mixture of history and batch."""
    batch_fid: float
    """FID of this iteration's images alone: higher bias, no lag."""
    effective_size: float
    """Effective number of images in the mixture."""
    version: int = 0
    """The history has the iterations before this one; 0: the seed images."""
    bias: float = 0.0
    """Estimated bias of `fid` by few images: `diagnostics.bias_constant` over the effective size,
    at most `fid`. Too low for fewer than 2 D images."""
    batch_bias: float = 0.0
    """The same for `batch_fid`."""
    positive_share: float = float("nan")
    """Share of the valid images whose reward is positive."""
    class_rewards: dict[int, float] | None = None
    """Class -> mean reward of its valid images; None without classes."""
    between_classes: float = float("nan")
    """Standard deviation of the classes' mean rewards, which group normalisation removes."""
    within_classes: float = float("nan")
    """Root mean square deviation of rewards from their class's mean, which it keeps."""
    warnings: tuple[str, ...] = ()
    """Problems of the settings and what to change; each is given once."""
    spans: tuple[Span, ...] = ()

    @property
    def gap(self) -> float:
        """`batch_fid` - `fid`: bias of the smaller set minus the history's lag."""
        return self.batch_fid - self.fid

    @property
    def lag(self) -> float:
        """`fid` - `batch_fid`, each without its bias: above 0, the policy is better than its
        history, and a shorter window would follow closer. As rough as the bias estimates."""
        return (self.fid - self.bias) - (self.batch_fid - self.batch_bias)

    def packed(self) -> dict[str, Any]:
        """Fields for msgpack, without spans and warnings: equal states give equal bytes."""
        fields = asdict(self)
        del fields["spans"], fields["warnings"]
        return fields | {"rewards": pack_array(self.rewards)}

    @classmethod
    def unpacked(cls, fields: dict[str, Any]) -> DistributionReward:
        """Inverse of `packed`."""
        return cls(**(fields | {"rewards": unpack_array(fields["rewards"])}))
