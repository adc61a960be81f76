"""Memory of a learner and of a sampler, computed.

Weights, gradients and optimizer are exact. Activations are what autograd keeps, declared by the
policy's `Family` (a test compares). Logits exist in pieces (`LOGITS_AT_ONCE`); the backward pass
computes them again. The temporary memory of logits' gradients is an estimate.

Units: bytes; d width, f hidden width, V vocabulary, T tokens, B rollouts of a microbatch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from actors.checkpoints.loading import count_parameters
from actors.checkpoints.zoo import family_of
from actors.decoding.decode import positions_at_once
from actors.kernels.attention import padded_head_dim
from actors.models.base import PolicyArchitecture
from learner.training.data_parallel import GATHERED_BELOW

FP32, BF16 = 4, 2
LAYER_INPUT = 4  # bytes a token and unit of width: the residual stream is fp32 in both precisions
LOGITS_KEPT = 8  # log-probabilities, and probabilities for the entropy's gradient; fp32
LOGITS_MOMENT = 14  # two fp32 gradients, and the logits' own in bf16 and fp32


@dataclass(frozen=True, kw_only=True)
class LearnerMemory:
    """Bytes of each part."""

    weights: float
    gradients: float
    optimizer: float
    """AdamW's two averages."""
    gathered: float
    """With several learners, which hold shards of the three above: the sum of an update's
    gradients, exchanged in its last pass; and weights: all of small policies; of large ones two
    blocks (the current and the prefetched one) and what is outside of blocks."""
    reference: float
    casts: float
    """bf16 copies of weights that autocast caches during a pass."""
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def learner_memory(
    architecture: PolicyArchitecture,
    *,
    microbatch: int,
    precision: Literal["fp32", "bf16"] = "bf16",
    checkpointing: bool = True,
    reference: bool = True,
    learners: int = 1,
    guided: bool = False,
) -> LearnerMemory:
    """Peak memory of a learner. It hardly depends on the number of rollouts of an iteration.

    Args:
        microbatch: rollouts of one pass (B).
        reference: a frozen copy is kept beside the policy.
        learners: number of shards of weights, gradients and optimizer.
        guided: logprobs of the guided mixture, with two batch rows a rollout.
    """
    parameters = count_parameters(architecture)
    rows = microbatch * (2 if guided else 1)
    positions = rows * architecture.num_tokens
    family = family_of(architecture)
    layer = positions * family.layer_activations(architecture, precision)
    layers = architecture.num_layers
    kept = float(layers * layer)
    casts = float(BF16 * parameters) if precision == "bf16" and learners == 1 else 0.0
    if checkpointing:
        kept = layers * positions * LAYER_INPUT * architecture.dim + layer
        casts = casts / layers  # a layer's casts live as long as its activations
    tokens = microbatch * architecture.num_tokens
    at_once = min(tokens, positions_at_once(architecture.vocab_size, guided=guided))
    last = family.norm_activations if at_once == tokens else LAYER_INPUT
    moment = LOGITS_MOMENT * (2 if guided else 1)
    return LearnerMemory(
        weights=FP32 * parameters / learners,
        gradients=FP32 * parameters / learners,
        optimizer=2 * FP32 * parameters / learners,
        gathered=_gathered(architecture, parameters, precision) if learners > 1 else 0,
        reference=FP32 * parameters if reference else 0,
        casts=casts,
        activations=kept + last * positions * architecture.dim,
        logits=float((LOGITS_KEPT + moment) * at_once * architecture.vocab_size),
    )


def _gathered(architecture: PolicyArchitecture, parameters: int, precision: str) -> float:
    one_less = dataclasses.replace(architecture, num_layers=architecture.num_layers - 1)
    block = parameters - count_parameters(one_less)
    outside = parameters - architecture.num_layers * block
    blocks = architecture.num_layers if parameters < GATHERED_BELOW else 2
    weights = (BF16 if precision == "bf16" else FP32) * blocks * block + FP32 * outside
    return float(weights + FP32 * parameters)


def sampler_memory(
    architecture: PolicyArchitecture,
    *,
    rollouts: int,
    dtype: Literal["float32", "bfloat16"] = "float32",
    guided: bool = False,
    max_groups: int = 1,
) -> float:
    """Bytes of a sampler: weights, and the KV cache of the largest batch, which all others share.

    Args:
        rollouts: of a group.
        max_groups: decoded together at most.
    """
    width = FP32 if dtype == "float32" else BF16
    rows = rollouts * (2 if guided else 1) * max_groups
    heads = architecture.num_heads * padded_head_dim(architecture.head_dim, "cuda")
    cache = 2 * architecture.num_layers * rows * architecture.num_tokens * heads
    return width * (count_parameters(architecture) + cache)
