"""Advantages of a batch of scored groups: A = sum_r w_r z_r.

Instance rewards (CLIP, preference) and the distribution reward (leave-one-out FID) are normalised
separately, then weighted and added.

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
    """Advantages of a batch, and its rewards."""

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
    """Name of a reward with a limit -> share of images whose normalised reward was clipped."""
    flat_groups: int
    """Number of groups without a learning signal: all rollouts have equal rewards."""


def group_advantages(
    groups: Sequence[ScoredGroup],
    distribution: Mapping[str, np.ndarray],
    combiner: Combiner,
) -> Advantages:
    """Advantages of a batch.

    Args:
        groups: P scored groups of K rollouts.
        distribution: reward name -> (P, K), rewards of the batch (leave-one-out FID).
        combiner: weights and normalisation of the rewards.
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
