"""From raw scores to one advantage an image: each reward normalised apart, then weighted.

Rewards live on different scales (a cosine, an FID difference), so each is centred within its group
and divided by a deviation before it is weighted: A = sum_r w_r z_r.

Shapes: P groups, K rollouts a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Normalisation = Literal["group", "batch", "anchored"]
EPSILON = 1e-4  # added to a group's deviation, as in the public code of 2603.23086
ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class RewardTerm:
    """One reward's part in the advantage."""

    weight: float = 1.0
    """Factor of the normalised reward; 0 logs it and learns nothing from it."""
    normalise: Normalisation = "group"
    """group: by the deviation within the group. batch: by the deviation over the batch.
    anchored: by the deviation that the base policy showed within its groups."""
    limit: float = 0.0
    """Largest normalised reward, in deviations; 0 is no limit."""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight must be >= 0, found {self.weight}")
        if self.limit < 0:
            raise ValueError(f"limit must be >= 0 (0 is no limit), found {self.limit}")


@dataclass(frozen=True, kw_only=True)
class ScorerTerm(RewardTerm):
    """The part of a reward that a scorer gives."""

    enabled: bool = True
    """Whether the scorer is there at all; weight 0 keeps it for the records alone."""
    pool: str = ""
    """Reward servers that run the scorer: a name of reward_pools; empty is the main pool."""


def normalise_scores(scores: np.ndarray, valid: np.ndarray, how: Normalisation) -> np.ndarray:
    """Centre each group on its own mean, and scale.

    Args:
        scores: (P, K).
        valid: (P, K) bool; others count in no mean and no deviation, and get 0.
        how:
            group   divide by the group's own deviation (GRPO, 2402.03300): every group has the same
                    say, however small its differences are
            batch   divide by the deviation of all scores of the batch: groups keep their relative
                    weight, which suits a reward that is comparable across conditions (LOO-FID)

    Returns:
        (P, K) float64. A group without differences gets zeros.
    """
    values = np.where(valid, scores, np.nan).astype(np.float64)
    counts = valid.sum(1, keepdims=True)
    mean = np.nansum(values, 1, keepdims=True) / np.maximum(counts, 1)
    centred = np.where(valid, values - mean, 0.0)
    if how == "group":
        deviation = np.sqrt((centred**2).sum(1, keepdims=True) / np.maximum(counts, 1))
        return centred / (deviation + EPSILON)
    used = values[valid]
    spread = np.std(used) if used.size else 0.0
    # No absolute floor: leave-one-out rewards may be of any scale. Equal values differ by rounding.
    if spread <= ROUNDING * np.abs(used).max(initial=0.0):
        return np.zeros_like(centred)
    return centred / spread
