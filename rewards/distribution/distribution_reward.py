"""What the moments server answers, and how it is kept in a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cluster.io.checksum import pack_array, unpack_array
from cluster.spans import Span


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
    version: int = 0
    """The history compared with: iterations up to this one, itself left out; 0 is seed images."""
    bias: float = 0.0
    """About how much of `fid` is there because images are few: `diagnostics.bias_constant` over
    the effective size, at most `fid`. Too low where the images are fewer than 2 D."""
    batch_bias: float = 0.0
    """The same of `batch_fid`."""
    positive_share: float = float("nan")
    """Share of the valid images whose reward is positive."""
    class_rewards: dict[int, float] | None = None
    """Class -> mean reward of its valid images; None where no classes were given."""
    between_classes: float = float("nan")
    """Standard deviation of the classes' mean rewards: what group normalisation takes away."""
    within_classes: float = float("nan")
    """Root mean square deviation of rewards from their class's mean: what it leaves."""
    warnings: tuple[str, ...] = ()
    """What is wrong with the settings and what to change; each is told once."""
    spans: tuple[Span, ...] = ()

    @property
    def gap(self) -> float:
        """`batch_fid` less `fid`: bias of the smaller set, less what the history lags behind."""
        return self.batch_fid - self.fid

    @property
    def lag(self) -> float:
        """`fid` less `batch_fid`, each without its bias: above 0 the policy is better than its
        history, and a shorter window would follow it closer. As rough as the bias estimates."""
        return (self.fid - self.bias) - (self.batch_fid - self.batch_bias)

    def packed(self) -> dict[str, Any]:
        """As msgpack can hold it. Times of the clock, and warnings, which depend on what was said
        before, are left out: the same state would not be the same bytes."""
        fields = asdict(self)
        del fields["spans"], fields["warnings"]
        return fields | {"rewards": pack_array(self.rewards)}

    @classmethod
    def unpacked(cls, fields: dict[str, Any]) -> DistributionReward:
        """Inverse of `packed`."""
        return cls(**(fields | {"rewards": unpack_array(fields["rewards"])}))
