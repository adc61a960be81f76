"""The coefficient of the entropy bonus: fixed, or controlled towards a target entropy.

A controller is a pure function of its state and a measurement. Entropies are means over tokens, in
nats, of the distribution that is learned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from cluster.bounds import check_at_most

STEERED = ("target", "paper")


@dataclass(frozen=True, kw_only=True)
class PaperEntropy:
    """Constants of the `paper` controller; the defaults are those of the public code of 2603.23086,
    whose environment variables they are called by."""

    coef: float = 2.2e-3
    """Coefficient between warm-up and decay, at the target (ENT_COEF_BASE)."""
    min_coef: float = 7e-5
    """Smallest coefficient (ENT_MIN)."""
    max_coef: float = 4e-3
    """Largest coefficient (ENT_MAX)."""
    dead_zone: float = 0.015
    """Distance from the target, as a share of ln(vocabulary), that changes nothing
    (ENT_DEADBAND)."""
    sharpness: float = 3.0
    """Exponent of the distance from the target (ENT_K)."""
    warmup: float = 0.05
    """Share of the iterations in which the coefficient rises from 0 (WARMUP_FRAC)."""
    decay_from: float = 0.85
    """Share of the iterations after which the coefficient falls to 0 (DECAY_START_FRAC)."""

    def __post_init__(self) -> None:
        if not (0 <= self.min_coef <= self.max_coef and min(self.coef, self.dead_zone) >= 0):
            raise ValueError(
                "entropy.paper: coef and dead_zone must be >= 0 and 0 <= min_coef <= max_coef, "
                f"found {self}"
            )
        if not (0 <= self.warmup <= self.decay_from <= 1 and self.sharpness >= 0):
            raise ValueError(
                "entropy.paper: sharpness must be >= 0 and 0 <= warmup <= decay_from <= 1, found "
                f"{self}"
            )
        check_at_most(self, coef=1e6, max_coef=1e6, dead_zone=1e6, sharpness=500)


@dataclass(frozen=True, kw_only=True)
class EntropyConfig:
    """The entropy bonus."""

    controller: Literal["none", "fixed", "target", "paper"] = "none"
    """Control of the entropy bonus. none: no bonus. fixed: `coef` throughout. target: raise the
    coefficient while the entropy is below the base policy's, lower it while above. paper: the
    formula of the public code of 2603.23086."""
    coef: float = 0.0
    """Coefficient of the entropy bonus, or the initial one of the target controller; >= 0."""
    gain: float = 0.1
    """Change of the coefficient per relative entropy gap and iteration, of the target
    controller."""
    max_coef: float = 0.05
    """Largest coefficient of the target controller."""
    damping: float = 0.0
    """Decay of the target controller's moving average of the entropy, in [0, 1); 0: the last
    iteration only."""
    target: float = 0.0
    """Target entropy as a share of ln(vocabulary), in [0, 1); 0: the base policy's, as measured.
    The public code has 0.78 for LlamaGen-L."""
    paper: PaperEntropy = field(default_factory=PaperEntropy)

    def __post_init__(self) -> None:
        if not all(value >= 0 for value in (self.coef, self.gain, self.max_coef)):
            raise ValueError("coef, gain and max_coef of the entropy bonus must be >= 0")
        check_at_most(self, coef=1e6, gain=1e6, max_coef=1e6)
        if not (0 <= self.damping < 1 and 0 <= self.target < 1):
            raise ValueError(
                f"damping and target must be in [0, 1), found {self.damping} and {self.target}"
            )

    @property
    def needs_base(self) -> bool:
        """Whether the controller needs the base policy's entropy."""
        return self.controller in STEERED and self.target == 0


@dataclass(frozen=True)
class EntropyState:
    """State of a controller between iterations."""

    coefficient: float
    average: float | None = None
    """Moving average of the entropy, nats; None before the first."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurement after an iteration."""

    entropy: float
    """Mean token entropy of the behaviour policy, nats."""
    base_entropy: float | None
    """That of the base policy, measured before training, nats."""
    vocab_size: int
    progress: float
    """Share of training done when the next iteration begins, [0, 1]."""


def initial_state(config: EntropyConfig) -> EntropyState:
    """The state of the first iteration."""
    if config.controller == "none":
        return EntropyState(0.0)
    if config.controller == "paper":
        return EntropyState(paper_coefficient(0.0, 0.0, config.paper))
    return EntropyState(config.coef)


def next_state(config: EntropyConfig, state: EntropyState, found: Measured) -> EntropyState:
    """The state of the next iteration.

    target: clip(coefficient + gain (H0 - H) / H0, 0, max_coef), anchored to the base policy's
    entropy H0 as in AER (2510.10959); H is damped, see `EntropyConfig`.

    Raises:
        ValueError: the target is the base policy's entropy, which was not given.
    """
    if config.controller not in STEERED:
        return state
    scale = math.log(found.vocab_size)
    target = config.target * scale if config.target else found.base_entropy
    if target is None:
        raise ValueError("this controller needs the base policy's entropy")
    if config.controller == "paper":
        gap = (target - found.entropy) / scale
        return EntropyState(paper_coefficient(gap, found.progress, config.paper))
    average = found.entropy
    if state.average is not None and config.damping:
        average = config.damping * state.average + (1 - config.damping) * found.entropy
    # top_k 1: the base policy has no entropy
    gap = (target - average) / target if target > 0 else -float(average > 0)
    coefficient = min(max(state.coefficient + config.gain * gap, 0.0), config.max_coef)
    return EntropyState(coefficient, average)


def paper_coefficient(gap: float, progress: float, constants: PaperEntropy | None = None) -> float:
    """The public code's coefficient (2603.23086; read from the code, the paper may differ):

        e = target - H / ln V
        clamp(2.2e-3 s(p) (exp(3 e) if |e| > .015 else 1), 7e-5, 4e-3)

    s rises linearly to 1 at p = .05, stays, and falls as a cosine from p = .85 to 0 at the end.

    Args:
        gap: e, in units of ln V.
        progress: p, share of training done.
        constants: other ones than these.
    """
    c = constants or PaperEntropy()
    scale = progress / c.warmup if progress < c.warmup else 1.0
    if progress > c.decay_from:
        done = min((progress - c.decay_from) / (1 - c.decay_from), 1.0)
        scale = 0.5 * (1 + math.cos(math.pi * done))
    sharp = math.exp(c.sharpness * gap) if abs(gap) > c.dead_zone else 1.0
    return min(max(c.coef * scale * sharp, c.min_coef), c.max_coef)
