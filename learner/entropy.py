"""How strongly entropy is rewarded: fixed, or steered towards the base policy's own entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EntropyConfig:
    """The entropy bonus."""

    controller: Literal["none", "fixed", "target"] = "none"
    """none: no bonus. fixed: `coef` throughout. target: raise the coefficient while the policy's
    entropy is below the base policy's measured entropy, lower it while above."""
    coef: float = 0.0
    """The coefficient, or where the target controller starts; >= 0."""
    gain: float = 0.1
    """Target controller: change of the coefficient per relative entropy gap and iteration."""
    max_coef: float = 0.05
    """Target controller: the coefficient's ceiling."""

    def __post_init__(self) -> None:
        if min(self.coef, self.gain, self.max_coef) < 0:
            raise ValueError("coef, gain and max_coef of the entropy bonus must be >= 0")


def initial_coefficient(config: EntropyConfig) -> float:
    """The coefficient of the first iteration."""
    return 0.0 if config.controller == "none" else config.coef


def next_coefficient(
    config: EntropyConfig, coefficient: float, entropy: float, base_entropy: float
) -> float:
    """The coefficient of the next iteration.

    target: clip(coefficient + gain (H0 - H) / H0, 0, max_coef), anchored to the base policy's
    entropy H0 as in AER (2510.10959).

    Args:
        entropy: mean token entropy of this iteration, nats.
        base_entropy: that of the base policy, measured before training, nats.
    """
    if config.controller != "target":
        return coefficient
    gap = (base_entropy - entropy) / base_entropy
    return min(max(coefficient + config.gain * gap, 0.0), config.max_coef)
