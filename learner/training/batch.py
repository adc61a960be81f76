"""Messages between main loop and learner: the batch of a step, and its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.messages import Condition, SamplingSpec, ScoredGroup
from cluster.spans import Span
from learner.grpo.advantage import Advantages


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch:
    """N valid rollouts of one iteration, in the order of their groups."""

    iteration: int
    tokens: np.ndarray
    """(N, T) int32"""
    behaviour: np.ndarray
    """(N, T) float32 behaviour logprobs."""
    conditions: tuple[Condition, ...]
    """N, one a rollout."""
    advantages: np.ndarray
    """(N,) float32"""
    versions: np.ndarray
    """(N,) int64: policy version of each rollout."""
    specs: tuple[SamplingSpec, ...]
    """The distinct sampling specs; the learner accepts only its own."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Result of a step."""

    version: int
    """Policy version after the step."""
    metrics: dict[str, float]
    spans: tuple[Span, ...]
    """Of the step, and of snapshots packed since the last one."""


def make_batch(
    iteration: int, groups: Sequence[ScoredGroup], advantages: Advantages
) -> TrainingBatch:
    """The batch of an iteration, without rollouts whose image was not scored."""
    rollouts = [group.rollouts for group in groups]
    keep = advantages.valid.reshape(-1)
    size = advantages.valid.shape[1]
    asked = [group.request.condition for group in rollouts for _ in range(size)]
    return TrainingBatch(
        iteration=iteration,
        tokens=np.concatenate([group.tokens for group in rollouts])[keep],
        behaviour=np.concatenate([group.logprobs for group in rollouts])[keep],
        conditions=tuple(condition for condition, kept in zip(asked, keep) if kept),
        advantages=advantages.values.reshape(-1)[keep],
        versions=np.repeat(np.array([group.version for group in rollouts]), size)[keep],
        specs=tuple(dict.fromkeys(group.request.spec for group in rollouts)),
    )
