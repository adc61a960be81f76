"""From a batch of scored groups to one advantage for every rollout.

Instance rewards (CLIP, preference) and the distribution reward (leave-one-out FID) are normalised
apart, then weighted and added: A = sum_r w_r z_r.

Shapes: P groups, K rollouts a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.messages import ScoredGroup
from rewards.combine import Combiner


@dataclass(frozen=True)
class Advantages:
    """Advantages of a batch and the rewards they came from."""

    values: np.ndarray
    """(P, K) float32; 0 where not valid."""
    valid: np.ndarray
    """(P, K) bool: False where a scorer failed on the image."""
    rewards: dict[str, np.ndarray]
    """Reward name -> (P, K) raw values, NaN where not valid."""
    normalised: dict[str, np.ndarray]
    """Reward name -> (P, K) after normalisation and clipping, before the weight; 0 where not
    valid."""
    clipped: dict[str, float]
    """Reward name -> share of images whose normalised reward was clipped; of those with a limit."""
    flat_groups: int
    """Groups in which every rollout got the same rewards: they teach nothing."""


def group_advantages(
    groups: Sequence[ScoredGroup],
    distribution: Mapping[str, np.ndarray],
    combiner: Combiner,
) -> Advantages:
    """Advantages of a batch.

    Args:
        groups: P scored groups of K rollouts.
        distribution: reward name -> (P, K), what no single image has (the leave-one-out FID).
        combiner: has the weight and normalisation of every reward.
    """
    valid = np.stack([group.scores.valid for group in groups])
    names = groups[0].scores.scores.keys()
    rewards = {name: np.stack([group.scores.scores[name] for group in groups]) for name in names}
    rewards.update(distribution)
    combined = combiner(rewards, valid)
    return Advantages(
        values=combined.values.astype(np.float32),
        valid=valid,
        rewards=rewards,
        normalised=combined.normalised,
        clipped=combined.clipped,
        flat_groups=int((np.abs(combined.values) < 1e-8).all(1).sum()),
    )
