"""Off-policy corrections: importance weights and token masks. Pure functions on logprobs.

*behaviour* is the policy that sampled the tokens, *proximal* the learner before the update. For
fresh rollouts they are equal up to rounding.

Shapes: B rollouts, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mean_log_ratio(gap: Tensor) -> Tensor:
    """(1/T) sum_t of log-ratios: (B, T) -> (B, 1).

    A token that top-k or top-p drops has log-ratio -inf. It counts as 0, without gradient, so that
    it does not make the ratio of the whole rollout 0.
    """
    return gap.masked_fill(gap == -torch.inf, 0).mean(1, keepdim=True)


def truncated_weights(
    proximal: Tensor, behaviour: Tensor, cap: float, *, sequence: bool = False
) -> Tensor:
    """Truncated importance weights: min(proximal / behaviour, cap), without gradient.

    With the ratio to proximal this is the decoupled objective of AReaL (2505.24298), truncated to
    bound its variance (Ionides 2008; IMPALA, 1802.01561).

    Args:
        proximal, behaviour: (B, T) logprobs.
        sequence: one weight a rollout, of length-normalised logprobs.

    Returns:
        (B, T), or (B, 1).
    """
    gap = (proximal - behaviour).detach()
    if sequence:
        gap = mean_log_ratio(gap)
    return gap.exp().clamp(max=cap)


def tokens_in_band(proximal: Tensor, behaviour: Tensor, low: float, high: float) -> Tensor:
    """IcePop's mask (2510.18855), (B, T) bool: low <= proximal / behaviour <= high. A ratio outside
    is numerical error rather than a change of the policy."""
    ratio = (proximal - behaviour).detach().exp()
    return (ratio >= low) & (ratio <= high)


def kept_weights(kept: Tensor, share: float) -> Tensor:
    """Weights (B, T) fp32 that turn a mean over all tokens into one over the kept tokens.

    Args:
        kept: (B, T) bool, of this learner.
        share: of kept tokens in the batch of all learners; 0 gives zeros.
    """
    return kept.float() / share if share else torch.zeros_like(kept, dtype=torch.float32)


def kept_weights_of_sequences(kept: Tensor) -> Tensor:
    """Weights (B, T) fp32 for a mean over rollouts of the mean over each one's kept tokens. A
    rollout without kept tokens counts as 0."""
    counts = kept.sum(1, keepdim=True)
    return kept.float() * kept.shape[1] / counts.clamp(min=1)
