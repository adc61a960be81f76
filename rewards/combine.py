"""Combines raw scores into one advantage an image: A = sum_r w_r clip(z_r).

Rewards have different scales (a cosine, an FID difference): each is centred within its group and
divided by a deviation before it is weighted.

Shapes: P groups, K rollouts a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgpack
import numpy as np

from cluster.bounds import check_at_most
from cluster.errors import CheckpointError
from cluster.io.checksum import UNREADABLE, add_checksum, verify_checksum

Normalisation = Literal["group", "batch", "anchored", "centred"]
EPSILON = 1e-4  # added to a group's deviation, as in the public code of 2603.23086
ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class RewardTerm:
    """A reward's weight and normalisation in the advantage."""

    weight: float = 1.0
    """Factor of the normalised reward; 0 logs it only."""
    normalise: Normalisation = "group"
    """Divisor of the centred reward. group: the standard deviation within the group. batch: that
    over the batch. anchored: that within groups of the first iteration, so that the reward's
    influence shrinks with its differences. centred: none (Dr.GRPO)."""
    limit: float = 0.0
    """Largest magnitude of the normalised reward, in standard deviations; larger ones are clipped.
    0 is no limit."""

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"weight must be >= 0, found {self.weight}")
        if not self.limit >= 0:
            raise ValueError(f"limit must be >= 0 (0 is no limit), found {self.limit}")
        check_at_most(self, weight=1e6, limit=1e6)


@dataclass(frozen=True)
class Combined:
    """Advantages of a batch."""

    values: np.ndarray
    """(P, K) float64 advantages; 0 where not valid."""
    normalised: dict[str, np.ndarray]
    """Reward name -> (P, K), after normalisation and clipping, before the weight."""
    clipped: dict[str, float]
    """Name of a reward with a limit -> share of valid images that were clipped."""


class Combiner:
    """Combines a run's rewards. The anchors of `anchored` rewards come from the first batch and are
    saved in checkpoints."""

    def __init__(self, terms: Mapping[str, RewardTerm]) -> None:
        self.terms = dict(terms)
        self.anchors: dict[str, float] | None = None

    def __call__(self, rewards: Mapping[str, np.ndarray], valid: np.ndarray) -> Combined:
        """Rewards (P, K) by name and a validity mask (P, K) -> advantages."""
        if self.anchors is None:
            self.anchors = {name: spread_within(values, valid) for name, values in rewards.items()}
        return combine_rewards(rewards, valid, self.terms, self.anchors)

    def state(self) -> bytes:
        """The anchors (msgpack)."""
        return add_checksum(msgpack.packb({"anchors": self.anchors}))

    def restore(self, state: bytes) -> None:
        """Inverse of `state`.

        Raises:
            CheckpointError: damaged.
        """
        try:
            anchors = msgpack.unpackb(verify_checksum(state))["anchors"]
            self.anchors = None if anchors is None else {k: float(v) for k, v in anchors.items()}
        except UNREADABLE as error:
            raise CheckpointError(f"the rewards' anchors cannot be read: {error}") from error


def combine_rewards(
    rewards: Mapping[str, np.ndarray],
    valid: np.ndarray,
    terms: Mapping[str, RewardTerm],
    anchors: Mapping[str, float],
) -> Combined:
    """A = sum_r w_r clip(z_r, -limit_r, limit_r), see `normalise_scores`.

    Args:
        rewards: name -> (P, K), NaN where not valid.
        valid: (P, K) bool.
        terms: name -> weight, normalisation, limit; one for every reward.
        anchors: name -> deviation, of anchored rewards.
    """
    total = np.zeros(valid.shape)
    normalised: dict[str, np.ndarray] = {}
    clipped: dict[str, float] = {}
    for name, scores in rewards.items():
        term = terms[name]
        z = normalise_scores(scores, valid, term.normalise, anchors.get(name, 0.0))
        if term.limit:
            if valid.any():
                clipped[name] = float((np.abs(z) > term.limit)[valid].mean())
            z = z.clip(-term.limit, term.limit)
        normalised[name] = z
        if term.weight:
            total += term.weight * z
    return Combined(total, normalised, clipped)


def spread_within(scores: np.ndarray, valid: np.ndarray) -> float:
    """Root mean square deviation of scores (P, K) from their group's mean; 0 if none is valid."""
    centred = _centred(scores, valid)
    return float(np.sqrt((centred[valid] ** 2).mean())) if valid.any() else 0.0


def normalise_scores(
    scores: np.ndarray, valid: np.ndarray, how: Normalisation, anchor: float = 0.0
) -> np.ndarray:
    """Centre each group on its mean and scale.

    Args:
        scores: (P, K).
        valid: (P, K) bool; others are in no mean and no deviation, and get 0.
        how:
            group     divide by the group's deviation (GRPO, 2402.03300): groups have equal weight
            batch     divide by the deviation of all scores of the batch: groups keep their relative
                      weight, for rewards that are comparable across conditions (LOO-FID)
            anchored  divide by `anchor`, constant in a run
            centred   do not divide (Dr.GRPO, 2503.20783): groups weigh by their differences
        anchor: a deviation, >= 0, in the unit of the scores.

    Returns:
        (P, K) float64; zeros for a group of equal scores.
    """
    centred = _centred(scores, valid)
    if how == "centred":
        return centred
    if how == "group":
        counts = np.maximum(valid.sum(1, keepdims=True), 1)
        return centred / (np.sqrt((centred**2).sum(1, keepdims=True) / counts) + EPSILON)
    used = np.asarray(scores, np.float64)[valid]
    spread = anchor if how == "anchored" else (np.std(used) if used.size else 0.0)
    # A relative floor: leave-one-out rewards have any scale, and equal values differ by rounding.
    if spread <= ROUNDING * np.abs(used).max(initial=0.0):
        return np.zeros_like(centred)
    return centred / spread


def _centred(scores: np.ndarray, valid: np.ndarray) -> np.ndarray:
    values = np.where(valid, scores, np.nan).astype(np.float64)
    mean = np.nansum(values, 1, keepdims=True) / np.maximum(valid.sum(1, keepdims=True), 1)
    return np.where(valid, values - mean, 0.0)
