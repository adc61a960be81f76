"""What is done about rollouts that another policy drew: importance weights and token masks.

Three policies appear. *behaviour* drew the tokens, *proximal* is the learner before the update, and
the learner itself moves away from it. Where rollouts are fresh and both sides compute alike,
behaviour and proximal are one. Pure functions on logprobs.

Shapes: B rollouts, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mean_log_ratio(gap: Tensor) -> Tensor:
    """(1/T) sum_t of log-ratios (B, T), over the tokens that both policies may draw; (B, 1).

    A token that top-k or top-p drops has log-ratio -inf. It counts as 0 here, so that one such
    token does not make the ratio of the whole rollout 0; and it has no gradient.
    """
    return gap.masked_fill(gap == -torch.inf, 0).mean(1, keepdim=True)


def truncated_weights(
    proximal: Tensor, behaviour: Tensor, cap: float, *, sequence: bool = False
) -> Tensor:
    """Truncated importance sampling: min(proximal / behaviour, cap), no gradient.

    With the surrogate's ratio taken against proximal this is the decoupled objective of AReaL
    (2505.24298); the truncation bounds its variance (Ionides 2008; IMPALA, 1802.01561).

    Args:
        proximal, behaviour: (B, T) logprobs.
        sequence: one weight a rollout, of the length-normalised logprobs.

    Returns:
        (B, T), or (B, 1).
    """
    gap = (proximal - behaviour).detach()
    if sequence:
        gap = mean_log_ratio(gap)
    return gap.exp().clamp(max=cap)


def tokens_in_band(proximal: Tensor, behaviour: Tensor, low: float, high: float) -> Tensor:
    """Which tokens stay: low <= proximal / behaviour <= high. IcePop (2510.18855) drops the rest:
    where the two disagree that much, the weight is an error of one of them rather than news.

    Returns:
        (B, T) bool
    """
    ratio = (proximal - behaviour).detach().exp()
    return (ratio >= low) & (ratio <= high)


def kept_weights(kept: Tensor, share: float) -> Tensor:
    """Weights that make a mean over all tokens a mean over the kept tokens of the batch.

    Args:
        kept: (B, T) bool, of this part of the batch.
        share: of the kept tokens among those of the whole batch, all microbatches and learners.

    Returns:
        (B, T) fp32; zeros where nothing at all is kept.
    """
    return kept.float() / share if share else torch.zeros_like(kept, dtype=torch.float32)


def kept_weights_of_sequences(kept: Tensor) -> Tensor:
    """The same for a mean over rollouts of the mean over each one's kept tokens. A rollout of which
    nothing is kept counts as zero: it stays in the number of rollouts.

    Returns:
        (B, T) fp32
    """
    counts = kept.sum(1, keepdim=True)
    return kept.float() * kept.shape[1] / counts.clamp(min=1)  # no kept token, no weight to scale
