"""Small models and messages for tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actors.checkpoints.loading import build_policy
from actors.models.base import PolicyModule
from actors.models.llamagen import LlamaGen, LlamaGenConfig
from actors.models.taming import TamingConfig, TamingGPT
from cluster.messages import (
    MAIN_SPACE,
    Condition,
    GroupScores,
    RolloutGroup,
    SampleRequest,
    SamplingSpec,
    ScoredGroup,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
"""Of tests whose body is the same on a GPU."""
TINY = LlamaGenConfig(dim=32, num_layers=2, num_heads=2, grid=3, vocab_size=20, num_classes=4)
SPECS = {
    "plain": SamplingSpec(),
    "temperature": SamplingSpec(temperature=0.7),
    "top_k": SamplingSpec(top_k=6),
    "top_p": SamplingSpec(top_p=0.8),
    "all filters": SamplingSpec(temperature=1.2, top_k=9, top_p=0.9),
    "guided": SamplingSpec(cfg_scale=1.5, guidance="guided"),
    "guided, filtered": SamplingSpec(cfg_scale=2.0, top_k=8, top_p=0.95, guidance="guided"),
}


def random_policy(config: LlamaGenConfig, seed: int = 0) -> LlamaGen:
    """Random weights, large enough that attention is uneven and logits differ."""
    torch.manual_seed(seed)
    policy = LlamaGen(config)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
    return policy.eval().requires_grad_(False)


def balanced_policy(config: LlamaGenConfig | TamingConfig, gain: float = 4) -> PolicyModule:
    """Random weights with activations of unit size, as trained ones have: bf16 rounds them as
    much. Logits have a standard deviation of `gain`."""
    torch.manual_seed(0)
    policy = LlamaGen(config) if isinstance(config, LlamaGenConfig) else TamingGPT(config)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if name in ("tok_embeddings.weight", "tok_emb.weight", "pos_emb") or "_table" in name:
                weight.normal_()
            elif weight.ndim > 1:
                head = name in ("output.weight", "head.weight")
                weight.normal_(std=(gain if head else 1) * weight.shape[1] ** -0.5)
    return policy.eval().requires_grad_(False)


def in_bf16(policy: PolicyModule) -> PolicyModule:
    """A sampler's copy: bf16 weights, fp32 tables of RoPE."""
    device = next(policy.parameters()).device
    copy = build_policy(policy.config, device=device, dtype=torch.bfloat16)
    copy.load_state_dict(policy.state_dict())
    return copy.eval().requires_grad_(False)


def tiny_policy(seed: int = 0) -> LlamaGen:
    """A class-conditional policy that decodes in milliseconds."""
    return random_policy(TINY, seed)


def request(group: int = 0, rollouts: int = 3, **changes: object) -> SampleRequest:
    fields: dict = {
        "stream": "train",
        "iteration": 0,
        "group": group,
        "condition": Condition(text=f"class {group}", class_index=group),
        "num_rollouts": rollouts,
        "seed": 7,
        "spec": SamplingSpec(),
    }
    return SampleRequest(**{**fields, **changes})


def scored_group(
    scores: dict[str, list[float]],
    *,
    group: int = 0,
    errors: list[str | None] | None = None,
    features: np.ndarray | None = None,
    version: int = 0,
    tokens: int = 4,
    spec: SamplingSpec | None = None,
) -> ScoredGroup:
    """A group as it comes back from the fleet, with given scores."""
    count = len(next(iter(scores.values())))
    features = np.zeros((count, 2), np.float32) if features is None else features
    asked = request(group, count, spec=spec or SamplingSpec())
    generator = np.random.default_rng(group)
    rollouts = RolloutGroup(
        request=asked,
        version=version,
        tokens=generator.integers(0, 20, (count, tokens)).astype(np.int32),
        logprobs=np.full((count, tokens), -1.0, np.float32),
        entropies=np.full((count, tokens), 2.0, np.float32),
    )
    return ScoredGroup(
        rollouts=rollouts,
        scores=GroupScores(
            key=asked.key,
            scores={name: np.array(values, np.float32) for name, values in scores.items()},
            features={MAIN_SPACE: features},
            errors=tuple(errors or [None] * count),
        ),
    )
