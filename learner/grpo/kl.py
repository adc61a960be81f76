"""Estimators of the KL divergence from the reference policy. Pure functions.

Schulman, "Approximating KL divergence" (2020): with x drawn from p and d = log p(x) - log q(x),

    k1 = d                    unbiased, of any sign, high variance
    k2 = d^2 / 2              biased, >= 0
    k3 = exp(-d) - 1 + d      unbiased, >= 0, low variance

As terms of a *loss* their gradients differ. That of k1 is the gradient of log p, whose expectation
is zero: use k1 in the reward. That of k2 has the expectation of the KL's gradient; that of k3
agrees with it in first order of d.

Both logprobs are *unfiltered*: with temperature and guidance, without top-k and top-p. With filters
the KL is infinite as soon as one sampled token is outside the reference's top-k. NeMo RL does the
same (https://github.com/NVIDIA-NeMo/RL/pull/2053). Samples are drawn under the filter, so the
estimates say nothing of the tail that it drops.

Shapes: B rollouts, T tokens.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
Level = Literal["token", "sequence"]


def k1(logprobs: Tensor, other: Tensor) -> Tensor:
    """log p - log q."""
    return logprobs - other


def k2(logprobs: Tensor, other: Tensor) -> Tensor:
    """(log p - log q)^2 / 2."""
    return (logprobs - other).square() / 2


def k3(logprobs: Tensor, other: Tensor) -> Tensor:
    """Estimate of KL(p || q) from samples of p: q/p - log(q/p) - 1 >= 0.

    Args:
        logprobs: log p of the samples.
        other: log q of the samples.
    """
    gap = other - logprobs
    return gap.exp() - gap - 1


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def divergence(
    logprobs: Tensor, reference: Tensor, estimator: Estimator, level: Level = "token"
) -> Tensor:
    """Estimates of KL(policy || reference).

    Args:
        logprobs: (B, T) of the policy, unfiltered.
        reference: (B, T) of the frozen base policy, unfiltered.
        level: token: one estimate a token. sequence: one a rollout, of the length-normalised
            logprobs (1/T) sum_t log p_t, as the public code of 2603.23086 has it.

    Returns:
        (B, T), or (B, 1).
    """
    if level == "sequence":
        logprobs, reference = logprobs.mean(1, keepdim=True), reference.mean(1, keepdim=True)
    return ESTIMATORS[estimator](logprobs, reference)


def penalised_advantages(
    advantages: Tensor, estimates: Tensor, coef: float, baseline: float
) -> Tensor:
    """KL in the reward: A - coef (k - baseline), with the policy before the update.

    With estimates per token, at ratio 1, k1 here has the gradient of k2 in the loss. With one
    estimate a rollout, it acts as a terminal reward.

    Args:
        advantages: (B, 1)
        estimates: (B, T) or (B, 1), of `divergence`, without gradients.
        baseline: mean estimate of the batch; it changes no expectation.

    Returns:
        (B, T) or (B, 1)
    """
    return advantages - coef * (estimates - baseline)
