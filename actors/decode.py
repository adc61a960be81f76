"""KV-cached decoding and teacher-forced log-probabilities: one distribution, computed two ways.

Both are pure. Decoding takes its randomness as an argument (one uniform per token, inverse CDF), so
a rollout is a function of weights, condition, uniforms and `SamplingSpec`, wherever it is decoded.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cluster.messages import RequestKey, SamplingSpec


class Policy(Protocol):
    """What decoding and learning need of a model."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def null_conditions(self, conditions: Tensor) -> Tensor: ...

    def prefill(self, conditions: Tensor) -> tuple[Any, Tensor]: ...

    def decode_step(self, state: Any, tokens: Tensor) -> Tensor: ...

    def __call__(self, tokens: Tensor, conditions: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Decoded:
    """Rollouts of a batch."""

    tokens: Tensor
    """(B, T) int64"""
    logprobs: Tensor
    """(B, T) fp32: of the drawn tokens, under the distribution they were drawn from."""
    entropies: Tensor
    """(B, T) fp32, nats."""


def rollout_uniforms(seed: int, key: RequestKey, num_rollouts: int, num_tokens: int) -> np.ndarray:
    """The uniforms that decode a group: a function of (seed, stream, iteration, group, k) alone.

    Counter-based (Philox), so that a retry, another sampler or another number of samplers draws the
    same tokens.

    Returns:
        (K, T) float64 in [0, 1).
    """
    stream = zlib.crc32(key.stream.encode())
    rows = [
        np.random.Generator(
            np.random.Philox(key=[seed, stream], counter=[0, k, key.group, key.iteration])
        ).random(num_tokens)
        for k in range(num_rollouts)
    ]
    return np.stack(rows)


def guided_logits(conditional: Tensor, unconditional: Tensor, cfg_scale: float) -> Tensor:
    """Classifier-free guidance on whole logits, fp32: u + s (c - u)."""
    return unconditional + (conditional - unconditional) * cfg_scale


def filtered_logits(logits: Tensor, spec: SamplingSpec) -> Tensor:
    """Temperature, top-k, top-p; filtered tokens become -inf. logits (..., V) fp32.

    Ties at rank k stay. Top-p works on the softmax of what top-k left and keeps the first token
    that takes the sum over p.
    """
    if spec.temperature != 1:
        logits = logits / spec.temperature
    if 0 < spec.top_k < logits.shape[-1]:
        kth = logits.detach().topk(spec.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits.detach() < kth, -torch.inf)
    if spec.top_p < 1:
        ordered, order = logits.detach().sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
        before[..., 0] = 0
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before > spec.top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


def log_distribution(logits: Tensor, spec: SamplingSpec) -> tuple[Tensor, Tensor]:
    """Log-probabilities (..., V) and entropy (...), nats, after the spec's filters."""
    filtered = filtered_logits(logits, spec)
    logp = filtered.log_softmax(-1)
    # 0 log 0 = 0: keep the -inf of filtered tokens away from the product and its gradient.
    entropy = -(logp.exp() * logp.masked_fill(filtered == -torch.inf, 0)).sum(-1)
    return logp, entropy


def sample_tokens(logp: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse CDF: the first token whose cumulative probability exceeds the uniform.

    Args:
        logp: (B, V) log-probabilities.
        uniforms: (B,) float64 in [0, 1).

    Returns:
        (B,) int64; a token of probability zero is never drawn.
    """
    cumulative = logp.double().exp().cumsum(-1)
    targets = uniforms.unsqueeze(-1) * cumulative[..., -1:]
    tokens = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    # Rounding can carry a uniform next to 1 past the end: the last token of the support takes it.
    last = torch.searchsorted(cumulative, cumulative[..., -1:].contiguous()).squeeze(-1)
    return torch.minimum(tokens, last)


@torch.inference_mode()
def decode_tokens(
    policy: Policy, conditions: Tensor, uniforms: Tensor, spec: SamplingSpec
) -> Decoded:
    """Decode whole rollouts with a KV cache.

    Args:
        conditions: (B,) class indices.
        uniforms: (B, T) float64 in [0, 1), on the policy's device.
        spec: transforms of the logits; guidance runs as one batch of 2B rows.
    """
    guided = spec.guided_sampling
    rows = torch.cat([conditions, policy.null_conditions(conditions)]) if guided else conditions
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    state, logits = policy.prefill(rows)
    for position in range(policy.num_tokens):
        if position > 0:
            drawn = columns[-1][0]
            logits = policy.decode_step(state, drawn.repeat(2) if guided else drawn)
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = guided_logits(conditional, unconditional, spec.cfg_scale)
        logp, entropy = log_distribution(logits, spec)
        tokens = sample_tokens(logp, uniforms[:, position])
        columns.append((tokens, logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropy))
    return Decoded(*(torch.stack(column, dim=1) for column in zip(*columns)))


def token_logprobs(
    policy: Policy, tokens: Tensor, conditions: Tensor, spec: SamplingSpec
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given tokens under the spec, teacher-forced, with gradients.

    Under `guided` both branches get gradients; under `distil` the conditional policy alone counts
    (`SamplingSpec.learned`).

    Args:
        tokens: (B, T) integers.
        conditions: (B,) class indices.

    Returns:
        logprobs (B, T) and entropies (B, T), fp32.
    """
    learned = spec.learned()
    if learned.guided_sampling:
        rows = torch.cat([conditions, policy.null_conditions(conditions)])
        conditional, unconditional = policy(tokens.repeat(2, 1), rows).chunk(2)
        logits = guided_logits(conditional, unconditional, learned.cfg_scale)
    else:
        logits = policy(tokens, conditions)
    logp, entropies = log_distribution(logits, learned)
    return logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropies
