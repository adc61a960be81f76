"""The GRPO objective: clipped surrogate, KL to the reference, entropy bonus. Pure functions.

Shapes: B rollouts, T tokens. Logprobs are natural logarithms of the probabilities of the drawn
tokens, under the same `SamplingSpec` in sampler and learner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cluster.bounds import check_at_most
from learner.grpo.kl import Estimator, Level, divergence, k3
from learner.grpo.off_policy import mean_log_ratio

Aggregation = Literal["token-mean", "seq-mean", "sequence-ratio"]


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Clipping, KL, and the treatment of stale rollouts."""

    clip_low: float = 0.2
    """Clipping of the ratio from below, at 1 - clip_low; in [0, 1)."""
    clip_high: float = 0.2
    """Clipping of the ratio from above, at 1 + clip_high; >= 0."""
    aggregation: Aggregation = "token-mean"
    """How token losses are averaged. token-mean: mean over all tokens. seq-mean: mean over rollouts
    of each rollout's mean; differs only if tokens are masked. sequence-ratio: one ratio a rollout,
    of length-normalised logprobs (GSPO), which needs far narrower clips."""
    length_divisor: int = 0
    """Constant by which the sum over a rollout's tokens is divided (Dr.GRPO); 0: their number. (The
    other half, no deviation in the advantages, is `normalise` of the rewards.)"""
    kl_coef: float = 0.0
    """Weight of the KL divergence from the frozen base policy, >= 0; 0 needs no reference."""
    kl_estimator: Estimator = "k3"
    """Estimator of the KL divergence: k1, k2 or k3. The gradient of k1 in the loss is noise: use it
    in the reward."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL divergence enters. loss: a term of the loss. reward: subtracted from the
    advantages, with the policy before the update."""
    kl_level: Level = "token"
    """Level of the KL divergence. token: one a token. sequence: one a rollout, of length-normalised
    logprobs."""
    ratio_to: Literal["behaviour", "proximal"] = "behaviour"
    """Denominator of the ratio: the behaviour policy, or the learner before the update (one more
    forward pass)."""
    importance_cap: float = 0.0
    """Cap of the tokens' weights min(proximal / behaviour, cap), with ratio_to=proximal; 0: no
    weights."""
    mask_low: float = 0.0
    """Mask tokens with a proximal / behaviour ratio below this; 0: none."""
    mask_high: float = 0.0
    """Mask tokens with a proximal / behaviour ratio above this; 0: none."""

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low < 1:
            raise ValueError(f"clip_low must be in [0, 1), found {self.clip_low}")
        for name in ("clip_high", "length_divisor", "kl_coef", "importance_cap"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, found {getattr(self, name)}")
        check_at_most(
            self,
            clip_high=1e6,
            length_divisor=1 << 30,
            kl_coef=1e6,
            importance_cap=1e6,
            mask_low=1e6,
            mask_high=1e6,
        )
        if self.mask_low < 0 or (self.mask_high and self.mask_high <= max(self.mask_low, 0)):
            raise ValueError(
                "mask_low and mask_high must be a band 0 <= low < high (0 leaves a side open), "
                f"found {self.mask_low} and {self.mask_high}"
            )
        if self.importance_cap and self.ratio_to != "proximal":
            raise ValueError(
                "importance_cap needs ratio_to 'proximal': the ratio to the behaviour policy "
                "already holds that weight"
            )
        if self.masks and self.aggregation == "sequence-ratio":
            raise ValueError("masks leave out tokens, but 'sequence-ratio' has one ratio a rollout")
        if self.length_divisor and self.aggregation != "token-mean":
            raise ValueError(
                f"length_divisor goes with aggregation 'token-mean', found {self.aggregation!r}"
            )

    @property
    def masks(self) -> bool:
        """Whether tokens may be masked."""
        return self.mask_low > 0 or self.mask_high > 0

    @property
    def needs_proximal(self) -> bool:
        """Whether the loss needs logprobs of the learner before the update."""
        in_reward = self.kl_coef > 0 and self.kl_in == "reward"
        return self.ratio_to == "proximal" or self.masks or in_reward


@dataclass(frozen=True)
class LossStats:
    """Means over tokens, and one maximum; detached. `surrogate` becomes the metric loss/surrogate,
    each other field policy/NAME."""

    surrogate: Tensor
    entropy: Tensor
    reference_kl: Tensor | None
    """None if not measured."""
    mismatch_kl: Tensor
    """KL(behaviour || learner), k3; 0 before the first update if sampler and learner agree."""
    logprob_gap: Tensor
    """Largest |learner - behaviour logprob|; rounding only, before the first update."""
    ratio: Tensor
    clip_fraction: Tensor
    """Share of tokens whose gradient is clipped."""


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """PPO's pessimistic surrogate per token, to be minimised (Schulman et al. 2017, 1707.06347).

        max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A)

    Args:
        ratio: (B, T), or (B, 1) of whole rollouts.
        advantages: (B, 1) or (B, T)
    """
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(-ratio * advantages, -clipped * advantages)


def sequence_ratio(logprobs: Tensor, old: Tensor) -> Tensor:
    """GSPO's ratio of a rollout (Zheng et al. 2025, 2507.18071): exp((1/T) sum_t (log p - log q)),
    without filtered tokens (see `mean_log_ratio`). (B, T) logprobs -> (B, 1)."""
    return mean_log_ratio(logprobs - old).exp()


def constant_length(tokens: int, divisor: int) -> float:
    """Dr.GRPO's normalisation (Liu et al. 2025, 2503.20783), as a factor of the loss: T / divisor;
    1 for divisor 0. All rollouts have T tokens, so there is no length bias to remove; the factor
    matters for gradient clipping."""
    return tokens / divisor if divisor else 1.0


def grpo_loss(
    logprobs: Tensor,
    entropies: Tensor,
    behaviour: Tensor,
    advantages: Tensor,
    reference: Tensor | None,
    entropy_coef: float,
    config: LossConfig,
    *,
    old: Tensor | None = None,
    weights: Tensor | None = None,
    unfiltered: Tensor | None = None,
) -> tuple[Tensor, LossStats]:
    """The GRPO loss (Shao et al. 2024, 2402.03300) with entropy bonus, and its statistics.

        c mean_bt [ w_bt surrogate_bt + kl_coef k(learner || reference)_bt - entropy_coef H_bt ]

    Always a mean over tokens: masks and importance weights are in w (`learner.grpo.off_policy`), so
    microbatches add up exactly. c is `constant_length`. A token that the learner's own top-k or
    top-p drops (logprob -inf) has ratio 0 and no gradient.

    Args:
        logprobs: (B, T) of the learner, with gradients.
        entropies: (B, T) of the learner's distribution, with gradients.
        behaviour: (B, T) logprobs of the behaviour policy.
        advantages: (B,) or (B, T)
        reference: (B, T) unfiltered logprobs of the reference; None: no KL in the loss.
        old: (B, T) denominator of the ratio; None is `behaviour`.
        weights: (B, T) or (B, 1) of the surrogate; None is 1.
        unfiltered: (B, T) learner logprobs before top-k and top-p, with gradients, for the KL; None
            is `logprobs`.
    """
    # a token with probability 0 in the denominator has ratio 0, too
    old = behaviour if old is None else old.masked_fill(old == -torch.inf, torch.inf)
    ratio = (logprobs - old).exp()
    if config.aggregation == "sequence-ratio":
        ratio = sequence_ratio(logprobs, old)
    columns = advantages.unsqueeze(-1) if advantages.ndim == 1 else advantages
    surrogate = clipped_surrogate(ratio, columns, config.clip_low, config.clip_high)
    if weights is not None:
        surrogate = surrogate * weights
    loss = surrogate.mean() - entropy_coef * entropies.mean()
    reference_kl = None
    if reference is not None:
        own = logprobs if unfiltered is None else unfiltered
        estimates = divergence(own, reference, config.kl_estimator, config.kl_level)
        reference_kl = estimates.mean()
        loss = loss + config.kl_coef * reference_kl
    if config.length_divisor:
        loss = loss * constant_length(logprobs.shape[1], config.length_divisor)
    return loss, _stats(
        logprobs, entropies, behaviour, columns, ratio, surrogate, reference_kl, config
    )


@torch.no_grad()
def _stats(
    logprobs: Tensor,
    entropies: Tensor,
    behaviour: Tensor,
    advantages: Tensor,
    ratio: Tensor,
    surrogate: Tensor,
    reference_kl: Tensor | None,
    config: LossConfig,
) -> LossStats:
    low, high = 1 - config.clip_low, 1 + config.clip_high
    clipped = torch.where(advantages > 0, ratio > high, ratio < low)
    return LossStats(
        surrogate=surrogate.mean(),
        entropy=entropies.mean(),
        reference_kl=None if reference_kl is None else reference_kl.detach(),
        mismatch_kl=k3(behaviour, logprobs).mean(),
        logprob_gap=(logprobs - behaviour).abs().max(),
        ratio=ratio.mean(),
        clip_fraction=(clipped & (advantages != 0)).float().mean(),
    )
