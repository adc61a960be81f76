"""KV-cached decoding and teacher-forced log-probabilities: one distribution, computed two ways.

Both are pure functions. Randomness is an argument (one uniform per token, inverse CDF): a rollout
is a function of weights, condition, uniforms and `SamplingSpec`.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from actors.decoding.steps import Sampled, Workspace, with_null_conditions
from actors.distribution import log_distribution, mixed_logits, unfiltered_logprobs
from actors.models.base import Conditions, Policy
from cluster.errors import NotFiniteError
from cluster.messages import RequestKey, SamplingSpec

LOGITS_AT_ONCE = 1 << 25
"""Most logits of a teacher-forced pass that exist at once, 128 MiB of fp32: with V = 16,384, 2,048
rows of the head's product, which fill a GPU."""


@dataclass(frozen=True)
class Decoded:
    """Rollouts of a batch."""

    tokens: Tensor
    """(B, T) int64"""
    logprobs: Tensor
    """(B, T) fp32: of the tokens, under the distribution they were drawn from."""
    entropies: Tensor
    """(B, T) fp32, nats."""


def rollout_uniforms(seed: int, key: RequestKey, num_rollouts: int, num_tokens: int) -> np.ndarray:
    """The uniforms (K, T) of a group, float64 in [0, 1).

    A counter-based function (Philox) of (seed, stream, iteration, group, k) alone: a retry, another
    sampler or another number of samplers draws with the same numbers.
    """
    stream = zlib.crc32(key.stream.encode())
    rows = [
        np.random.Generator(
            np.random.Philox(key=[seed, stream], counter=[0, k, key.group, key.iteration])
        ).random(num_tokens)
        for k in range(num_rollouts)
    ]
    return np.stack(rows)


@torch.inference_mode()
def decode_tokens(
    policy: Policy,
    conditions: Conditions,
    uniforms: Tensor,
    spec: SamplingSpec,
    workspace: Workspace | None = None,
) -> Decoded:
    """Decode whole rollouts with a KV cache.

    Args:
        conditions: B of them, from `policy.encode`.
        uniforms: (B, T) float64 in [0, 1), on the policy's device.
        spec: transforms of the logits; guidance runs as one batch of 2B.
        workspace: cache and captured steps to reuse; None allocates them for this call.

    Raises:
        ConfigError: guidance with a policy that has no unconditional branch.
        NotFiniteError: the policy's logits, with guidance and temperature, were not finite.
    """
    workspace = workspace or Workspace(policy)
    inputs = with_null_conditions(policy, conditions, spec)
    sampled = workspace.prefill(inputs, uniforms[:, 0], spec)
    columns: list[Sampled] = [sampled]
    for position in range(1, policy.num_tokens):
        sampled = workspace.step(sampled.tokens, uniforms[:, position], spec)
        columns.append(sampled)
    decoded = Decoded(*(torch.stack(column, dim=1) for column in zip(*columns)))
    try:
        _check_finite(decoded, policy, spec)
    except NotFiniteError:
        workspace.clear()
        raise
    return decoded


def _check_finite(decoded: Decoded, policy: Policy, spec: SamplingSpec) -> None:
    """Refuse rollouts with NaN or infinite logprobs; one synchronisation with the device per batch.

    Raises:
        NotFiniteError: names the first token and the likely causes.
    """
    fine = decoded.logprobs.isfinite() & decoded.entropies.isfinite()
    if bool(fine.all()):
        return
    rows, places = (~fine).nonzero(as_tuple=True)
    causes = ["weights with NaN or infinities, or that have diverged"]
    kinds = {str(t.dtype).removeprefix("torch.") for t in policy.state_dict().values()}
    if half := sorted(kinds & {"float16", "bfloat16"}):
        causes.append(f"activations that overflow in {half[0]} (try float32)")
    if spec.guided_sampling:
        causes.append(f"the guidance scale {spec.cfg_scale:g}")
    if spec.temperature < 1:
        causes.append(f"the temperature {spec.temperature:g}")
    raise NotFiniteError(
        f"the policy's logits are not finite: {len(rows.unique())} of {len(fine)} rollouts, first "
        f"at token {int(places.min()) + 1} of {fine.shape[1]}. Possible causes: "
        f"{'; '.join(causes)}"
    )


class Likelihoods(NamedTuple):
    """Teacher-forced, of given tokens under a spec; (B, T) fp32, nats."""

    logprobs: Tensor
    """-inf where the spec filters the token out."""
    entropies: Tensor
    """Of the filtered distribution."""
    unfiltered: Tensor
    """Log-probabilities before top-k and top-p, always finite; `logprobs` itself without them."""


def token_logprobs(
    policy: Policy, tokens: Tensor, conditions: Conditions, spec: SamplingSpec
) -> tuple[Tensor, Tensor]:
    """The first two of `token_likelihoods`: logprobs (-inf where filtered out) and entropies."""
    found = token_likelihoods(policy, tokens, conditions, spec)
    return found.logprobs, found.entropies


def token_likelihoods(
    policy: Policy, tokens: Tensor, conditions: Conditions, spec: SamplingSpec
) -> Likelihoods:
    """Log-probabilities of given tokens under the spec, teacher-forced, with gradients.

    More than `LOGITS_AT_ONCE` logits are computed in pieces, and by the backward pass again.
    Under `guided` both branches get gradients; under `distil` only the conditional policy is used
    (`SamplingSpec.learned`).

    Args:
        tokens: (B, T) integers.
        conditions: B of them, from `policy.encode`.
    """
    learned = spec.learned()
    inputs = with_null_conditions(policy, conditions, learned)
    repeated = tokens.repeat(2, 1) if learned.guided_sampling else tokens
    at_once = positions_at_once(policy.vocab_size, guided=learned.guided_sampling)

    def readout(hidden: Tensor, to_logits: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        def of_piece(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
            return _likelihoods(to_logits(hidden.flatten(0, 1)), tokens, learned)

        if tokens.numel() <= at_once:
            parts = [_likelihoods(to_logits(hidden), tokens, learned)]
        else:
            branches = hidden.reshape(-1, tokens.numel(), hidden.shape[-1])  # (1 or 2, B T, dim)
            pieces = zip(branches.split(at_once, dim=1), tokens.flatten().split(at_once))
            parts = [_recomputed(of_piece, *piece) for piece in pieces]
        return tuple(torch.cat(column) for column in zip(*parts))

    found = [value.view(tokens.shape) for value in policy(repeated, inputs, readout)]
    return Likelihoods(found[0], found[1], found[-1] if learned.filters else found[0])


def positions_at_once(vocab_size: int, *, guided: bool) -> int:
    """Tokens whose logits exist at once; under guidance each has two rows of them."""
    return max(LOGITS_AT_ONCE // (vocab_size * (2 if guided else 1)), 1)


def _likelihoods(logits: Tensor, tokens: Tensor, spec: SamplingSpec) -> tuple[Tensor, ...]:
    """Logprobs, entropies and, with filters, unfiltered logprobs, each like `tokens`."""
    logits = mixed_logits(logits, spec)
    logp, entropies = log_distribution(logits, spec)
    logprobs = logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    if not spec.filters:
        return logprobs, entropies
    return logprobs, entropies, unfiltered_logprobs(logits, tokens, spec)


def _recomputed(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The function's results; the backward pass computes them again instead of keeping what they
    need."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
