"""The distribution a token is drawn from: guidance, temperature, filters; and the draw itself.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actors.running_sums import cumulative_probabilities, inverse_order
from cluster.messages import SamplingSpec


def guided_logits(conditional: Tensor, unconditional: Tensor, cfg_scale: float) -> Tensor:
    """Classifier-free guidance on whole logits, fp32: u + s (c - u)."""
    return unconditional + (conditional - unconditional) * cfg_scale


def mixed_logits(logits: Tensor, spec: SamplingSpec) -> Tensor:
    """Logits (2B, ..., V) of both branches -> guided logits (B, ..., V); unchanged without
    guidance."""
    if not spec.guided_sampling:
        return logits
    conditional, unconditional = logits.chunk(2)
    return guided_logits(conditional, unconditional, spec.cfg_scale)


def tempered_logits(logits: Tensor, spec: SamplingSpec) -> Tensor:
    """Logits divided by the temperature."""
    return logits if spec.temperature == 1 else logits / spec.temperature


def filtered_logits(logits: Tensor, spec: SamplingSpec) -> Tensor:
    """Temperature, top-k, top-p; filtered tokens become -inf. logits (..., V) fp32.

    Ties at rank k are kept. Top-p uses the softmax after top-k and keeps the first token that takes
    the sum over p.
    """
    logits = tempered_logits(logits, spec)
    if 0 < spec.top_k < logits.shape[-1]:
        kth = logits.detach().topk(spec.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits.detach() < kth, -torch.inf)
    if spec.top_p < 1:
        ordered, order = logits.detach().sort(dim=-1, descending=True)
        before = cumulative_probabilities(ordered.softmax(-1), ordered.dtype).roll(1, -1)
        before[..., 0] = 0
        drop = inverse_order(before > spec.top_p, order)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


def log_distribution(logits: Tensor, spec: SamplingSpec) -> tuple[Tensor, Tensor]:
    """Log-probabilities (..., V) and entropy (...), nats, after the spec's filters."""
    logp = filtered_logits(logits, spec).log_softmax(-1)
    finite = logp
    if spec.filters:
        # 0 log 0 = 0: keep the -inf of filtered tokens away from the product and its gradient.
        finite = logp.masked_fill(logp == -torch.inf, 0)
    return logp, -(logp.exp() * finite).sum(-1)


def unfiltered_logprobs(logits: Tensor, tokens: Tensor, spec: SamplingSpec) -> Tensor:
    """Log-probabilities (...) of tokens (...) by logits (..., V), before top-k and top-p: every
    token's is finite."""
    logits = tempered_logits(logits, spec)
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def sample_tokens(logp: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse CDF: the first token whose cumulative probability exceeds the uniform.

    Args:
        logp: (B, V) log-probabilities.
        uniforms: (B,) float64 in [0, 1).

    Returns:
        (B,) int64, in [0, V); a token of probability zero is never drawn. A row with NaN gives an
        arbitrary token: `decode_tokens` refuses the whole rollout later, which saves a device
        synchronisation per token.
    """
    cumulative = cumulative_probabilities(logp.exp(), torch.float64)
    targets = uniforms.unsqueeze(-1) * cumulative[..., -1:]
    tokens = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    # Rounding can carry a uniform next to 1 past the end: the last token of the support takes it.
    last = torch.searchsorted(cumulative, cumulative[..., -1:].contiguous()).squeeze(-1)
    return torch.minimum(tokens, last).clamp(max=logp.shape[-1] - 1)
