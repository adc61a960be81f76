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
from rewards.combine import RewardTerm, normalise_scores


@dataclass(frozen=True)
class Advantages:
    """Advantages of a batch and the rewards they came from."""

    values: np.ndarray
    """(P, K) float32; 0 where not valid."""
    valid: np.ndarray
    """(P, K) bool: False where a scorer failed on the image."""
    rewards: dict[str, np.ndarray]
    """Reward name -> (P, K) raw values, NaN where not valid."""
    flat_groups: int
    """Groups in which every rollout got the same rewards: they teach nothing."""


def group_advantages(
    groups: Sequence[ScoredGroup],
    distribution: Mapping[str, np.ndarray],
    terms: Mapping[str, RewardTerm],
) -> Advantages:
    """Advantages of a batch.

    Args:
        groups: P scored groups of K rollouts.
        distribution: reward name -> (P, K), what no single image has (the leave-one-out FID).
        terms: reward name -> weight and normalisation; one for every reward.
    """
    valid = np.stack([group.scores.valid for group in groups])
    names = groups[0].scores.scores.keys()
    rewards = {name: np.stack([group.scores.scores[name] for group in groups]) for name in names}
    rewards.update(distribution)
    values = np.zeros(valid.shape)
    for name, scores in rewards.items():
        term = terms[name]
        if term.weight:
            values += term.weight * normalise_scores(scores, valid, term.normalise)
    return Advantages(
        values=values.astype(np.float32),
        valid=valid,
        rewards=rewards,
        flat_groups=int((np.abs(values) < 1e-8).all(1).sum()),
    )
