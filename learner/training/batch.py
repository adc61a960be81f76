"""What one learning step is given: plain arrays, on the wire from the main loop to the learner."""

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
    """N of them: what each rollout was asked to show."""
    advantages: np.ndarray
    """(N,) float32"""
    versions: np.ndarray
    """(N,) int64: policy version that drew each rollout."""
    specs: tuple[SamplingSpec, ...]
    """The distinct sampling specs found; the learner accepts its own alone."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step did."""

    version: int
    """Policy version after the step."""
    metrics: dict[str, float]
    spans: tuple[Span, ...]
    """Of the step, and of the snapshots that were packed since the one before."""


def make_batch(
    iteration: int, groups: Sequence[ScoredGroup], advantages: Advantages
) -> TrainingBatch:
    """Rollouts whose images were scored; failed images leave the gradient altogether."""
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
