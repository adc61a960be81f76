"""The GRPO objective: clipped surrogate, KL to the reference, entropy bonus. Pure functions.

Shapes: B rollouts, T tokens. Logprobs are natural logarithms of the probabilities of the drawn
tokens, under the same `SamplingSpec` in sampler and learner.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Clipping and regularisation."""

    clip_low: float = 0.2
    """The ratio is clipped from below at 1 - clip_low, in [0, 1)."""
    clip_high: float = 0.2
    """The ratio is clipped from above at 1 + clip_high, >= 0."""
    kl_coef: float = 0.0
    """Weight of the KL divergence from the frozen base policy, >= 0; 0 needs no reference."""

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low < 1:
            raise ValueError(f"clip_low must be in [0, 1), found {self.clip_low}")
        if self.clip_high < 0:
            raise ValueError(f"clip_high must be >= 0, found {self.clip_high}")
        if self.kl_coef < 0:
            raise ValueError(f"kl_coef must be >= 0, found {self.kl_coef}")


@dataclass(frozen=True)
class LossStats:
    """Means over tokens, but for the one maximum; detached."""

    surrogate: Tensor
    entropy: Tensor
    reference_kl: Tensor
    mismatch_kl: Tensor
    """KL(behaviour || learner), k3: 0 before the first update if both sides agree."""
    logprob_gap: Tensor
    """Largest |learner - behaviour logprob|: rounding alone before the first update."""
    ratio: Tensor
    clip_fraction: Tensor
    """Share of tokens whose gradient the clip cuts off."""


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """PPO's pessimistic surrogate per token, to be minimised (Schulman et al. 2017, 1707.06347).

        max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A)

    Args:
        ratio: (B, T)
        advantages: (B, 1) or (B, T)
    """
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(-ratio * advantages, -clipped * advantages)


def k3(logprobs: Tensor, other: Tensor) -> Tensor:
    """Estimate of KL(p || q) from samples of p, per token: q/p - log(q/p) - 1 >= 0.

    Unbiased and of low variance (Schulman, "Approximating KL divergence", 2020).

    Args:
        logprobs: log p of the samples.
        other: log q of the samples.
    """
    gap = other - logprobs
    return gap.exp() - gap - 1


def grpo_loss(
    logprobs: Tensor,
    entropies: Tensor,
    behaviour: Tensor,
    advantages: Tensor,
    reference: Tensor | None,
    entropy_coef: float,
    config: LossConfig,
) -> tuple[Tensor, LossStats]:
    """Token-mean GRPO loss (Shao et al. 2024, 2402.03300), entropy bonus included.

        mean_bt [ surrogate_bt + kl_coef k3(learner || reference)_bt - entropy_coef H_bt ]

    Rollouts all have T tokens, so the mean over tokens is also the mean over rollouts of their
    token means.

    Args:
        logprobs: (B, T) learner logprobs, with gradients.
        entropies: (B, T) of the learner's distribution, with gradients.
        behaviour: (B, T) behaviour logprobs.
        advantages: (B,)
        reference: (B, T) logprobs of the frozen base policy, or None where kl_coef is 0.

    Returns:
        The loss and its statistics.
    """
    ratio = (logprobs - behaviour).exp()
    columns = advantages.unsqueeze(-1)
    surrogate = clipped_surrogate(ratio, columns, config.clip_low, config.clip_high)
    loss = surrogate.mean() - entropy_coef * entropies.mean()
    divergence = torch.zeros_like(logprobs)
    if reference is not None:
        divergence = k3(logprobs, reference)
        loss = loss + config.kl_coef * divergence.mean()
    with torch.no_grad():
        cut = torch.where(columns > 0, ratio > 1 + config.clip_high, ratio < 1 - config.clip_low)
        stats = LossStats(
            surrogate=surrogate.mean(),
            entropy=entropies.mean(),
            reference_kl=divergence.mean(),
            mismatch_kl=k3(behaviour, logprobs).mean(),
            logprob_gap=(logprobs - behaviour).abs().max(),
            ratio=ratio.mean(),
            clip_fraction=(cut & (columns != 0)).float().mean(),
        )
    return loss, stats
