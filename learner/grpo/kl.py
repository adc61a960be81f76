"""KL divergence from the frozen reference policy: estimators, and where they enter. Pure functions.

The estimators are Schulman's ("Approximating KL divergence", 2020). With x drawn from p and
d = log p(x) - log q(x), each has the expectation KL(p || q), but for k2, which is biased in second
order:

    k1 = d                    unbiased, of any sign, high variance
    k2 = d^2 / 2              biased, >= 0
    k3 = exp(-d) - 1 + d      unbiased, >= 0, low variance

As terms of a *loss* they differ in what their gradient means. The gradient of k1 is that of log p,
whose expectation is zero: it is noise, and k1 belongs to the reward. The gradient of k2 has the
expectation of the KL's own gradient; that of k3 agrees with it in first order of d.

Both logprobs are of the *unfiltered* distributions: temperature and guidance are applied, top-k and
top-p are not. A filter is a rule of sampling; what the KL holds near the base policy are the
weights. And with filters the divergence is infinite as soon as the policy may draw one token that
is outside the reference's own top-k, whatever the estimator. NeMo RL does the same: filtered
logprobs in the ratio, unfiltered ones of both policies in the KL
(https://github.com/NVIDIA-NeMo/RL/pull/2053). Samples are still drawn under the filter, so that the
estimates are expectations over the tokens that it keeps: they say nothing of the tail.

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
    """KL as a part of the reward: A - coef (k - baseline), for a policy that is not yet updated.

    With estimates per token (B, T), each token pays for its own divergence: at ratio 1 the gradient
    of k1 here is that of k2 in the loss. With one estimate a rollout (B, 1), every token answers
    for the divergence of the whole, later tokens included, as a terminal reward has it.

    Args:
        advantages: (B, 1)
        estimates: (B, T) or (B, 1), of `divergence`, without gradients.
        baseline: mean estimate of the batch; it changes no expectation.

    Returns:
        (B, T) or (B, 1)
    """
    return advantages - coef * (estimates - baseline)
