"""Updates skipped because they are not finite: when they stop a run, and the likely cause.

`GuardsConfig` is here because the learner needs it; the other guards are in
`learner.monitoring.guards`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Action = Literal["off", "warn", "stop"]

MUST_BE_FINITE = ("surrogate", "entropy", "reference_kl", "real_ce", "grad_norm")
"""Statistics that must be finite for an update. The others compare with the sampler, and may be
infinite: with other rounding, a top-k filter gives a sampled token probability 0 here."""


@dataclass(frozen=True, kw_only=True)
class GuardsConfig:
    """When a run that goes wrong warns, or stops. Checkpoints are kept."""

    max_skipped_share: float = 0.2
    """Largest share of the last `window` updates that may be skipped before the run stops, in [0,
    1]. Updates whose loss or gradient is not finite are skipped."""
    min_skipped: int = 3
    """Fewest skipped updates that stop the run; 1 with a share of 0 stops at the first."""
    window: int = 20
    """Number of last updates that are considered."""
    patience: int = 5
    """Consecutive bad iterations before one of the guards below acts."""
    reward: Action = "warn"
    """Guard against flat rewards: equal within every group, or a deviation over the batch of at
    most min_reward_std. off | warn | stop."""
    min_reward_std: float = 1e-8
    """Smallest standard deviation of a reward over the batch, in the reward's units, >= 0."""
    entropy: Action = "warn"
    """Guard against entropy below min_entropy_share of the base policy's. off | warn | stop."""
    min_entropy_share: float = 0.3
    """Smallest share of the base policy's mean token entropy, in [0, 1)."""
    kl: Action = "stop"
    """Guard against a KL divergence above one of the limits below. off | warn | stop."""
    max_reference_kl: float = 3.0
    """Largest KL divergence to the base policy, nats a token; measured with loss.kl_coef > 0."""
    max_mismatch_kl: float = 1.0
    """Largest KL divergence between samplers and learner, nats a token; ignored under guidance
    'distil'."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_skipped_share <= 1:
            raise ValueError(f"max_skipped_share must be in [0, 1], found {self.max_skipped_share}")
        for name in ("min_skipped", "window", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, found {getattr(self, name)}")
        if self.min_skipped > self.window:
            raise ValueError(
                f"min_skipped must be at most window, found {self.min_skipped} and {self.window}"
            )
        if not self.min_reward_std >= 0:
            raise ValueError(f"min_reward_std must be >= 0, found {self.min_reward_std}")
        if not 0 <= self.min_entropy_share < 1:
            raise ValueError(f"min_entropy_share must be in [0, 1), found {self.min_entropy_share}")
        if not (self.max_reference_kl > 0 and self.max_mismatch_kl > 0):
            raise ValueError(
                "max_reference_kl and max_mismatch_kl must be > 0, found "
                f"{self.max_reference_kl} and {self.max_mismatch_kl}"
            )
        for name in ("reward", "entropy", "kl"):
            if getattr(self, name) not in ("off", "warn", "stop"):
                raise ValueError(f"{name} must be off, warn or stop, found {getattr(self, name)!r}")


def is_applied(stats: Mapping[str, float]) -> bool:
    """Whether an update with these statistics is applied."""
    return all(math.isfinite(stats[name]) for name in MUST_BE_FINITE if name in stats)


def applied(updates: Sequence[dict[str, float]]) -> Sequence[dict[str, float]]:
    """Statistics of the updates that were not skipped; of all, if all were."""
    return [stats for stats in updates if is_applied(stats)] or updates


def too_many_skipped(config: GuardsConfig, updates: Sequence[bool]) -> bool:
    """Whether so many updates were skipped that the run must stop.

    Args:
        updates: whether each was skipped, oldest first; the last `window` count.
    """
    recent = updates[-config.window :]
    skipped = sum(recent)
    return skipped >= config.min_skipped and skipped > config.max_skipped_share * len(recent)


def not_finite_because(stats: Mapping[str, float]) -> str:
    """The likely cause of statistics that are not finite, and what to do.

    Args:
        stats: of the update: `LossStats`, grad_norm, real_ce.
    """

    def wrong(name: str) -> bool:
        return not math.isfinite(stats.get(name, 0.0))

    if wrong("entropy"):  # depends on the policy's logits only
        return (
            "The policy's own logits are not finite: its weights or activations have overflowed. "
            "Go on from an earlier checkpoint with a lower learner.lr, or learner.precision "
            "fp32; sampling.cfg_scale and sampling.temperature of ordinary size keep logits small"
        )
    if wrong("reference_kl"):
        return (
            "The KL to the base policy overflows: the two give a token probabilities that differ "
            "by more than a float holds. A lower learner.lr or a larger loss.kl_coef from the "
            "start keeps them together; loss.kl_estimator k2 does not take their exponential"
        )
    if wrong("real_ce"):
        return (
            "The cross-entropy on real tokens is what is not finite: look at real.source, or set "
            "real.weight to 0"
        )
    if wrong("surrogate"):
        return (
            "The ratio of learner to behaviour policy overflows, or an advantage is not finite: "
            "logprobs have run away from those of the sampler (policy/logprob_gap). A lower "
            "learner.lr, fewer updates_per_iteration, a smaller max_staleness or narrower clips "
            "hold them"
        )
    return (
        "The loss is finite, its gradient is not: it overflowed on its way through the network. "
        "learner.precision fp32 or a lower learner.lr mends this"
    )
