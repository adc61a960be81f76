"""The policy under training, for every family: checkpointing, adapters, precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from actors.checkpoints.loading import PolicyConfig, init_policy
from actors.decoding.decode import token_logprobs
from actors.models.base import PolicyArchitecture
from actors.models.llamagen import LlamaGenConfig
from actors.models.taming import TamingConfig, TamingGPT
from cluster.messages import Condition, SamplingSpec
from cluster.model_files.tensors import write_tensors
from learner.training.lora import LoraConfig
from learner.training.optimizer import OptimizerConfig
from learner.training.policy import LearnerPolicy

FAMILIES: dict[str, PolicyArchitecture] = {
    "classes": LlamaGenConfig(
        dim=32, num_layers=2, num_heads=2, grid=3, vocab_size=20, num_classes=4
    ),
    "captions": LlamaGenConfig(
        dim=32, num_layers=2, num_heads=2, grid=3, vocab_size=20, caption_dim=8, caption_tokens=5
    ),
    "taming": TamingConfig(
        dim=32, num_layers=2, num_heads=2, vocab_size=20, block_size=9, grid=3, num_classes=4
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Writes a random policy of a family; returns its file."""
    torch.manual_seed(0)
    architecture = FAMILIES[request.param]
    policy = init_policy(architecture)
    write_tensors(tmp_path / "policy.safetensors", policy.state_dict(), architecture.to_dict())
    return str(tmp_path / "policy.safetensors")


def trained(file: str, *, reference: bool = False, **options: object) -> LearnerPolicy:
    config = PolicyConfig(checkpoint=file)
    return LearnerPolicy(config, OptimizerConfig(**options), reference=reference)


def inputs(policy: LearnerPolicy) -> tuple:
    """Tokens (4, T) and conditions: two captions that two rows each share, or classes."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 20, (4, 9), generator=generator)
    features = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    captions = [features[0, :3], features[1]]
    asked = [
        Condition(text="", class_index=row % 4, features=captions[row // 2]) for row in range(4)
    ]
    return tokens, policy.module.encode(asked)


def gradients(policy: LearnerPolicy, spec: SamplingSpec = SamplingSpec()) -> dict:  # noqa: B008
    tokens, conditions = inputs(policy)
    logprobs, entropies, _ = policy.logprobs(tokens, conditions, spec)
    (logprobs.sum() - 0.1 * entropies.sum()).backward()
    named = policy.module.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("guided", [False, True])
def test_checkpointing_computes_the_same_gradients(family: str, guided: bool) -> None:
    kept, again = trained(family), trained(family, checkpointing=True)
    assert again.module.checkpointing
    if guided and isinstance(kept.module, TamingGPT):
        pytest.skip("a taming policy has no guidance")
    spec = SamplingSpec(cfg_scale=1.5, guidance="guided") if guided else SamplingSpec()
    expected = gradients(kept, spec)
    found = gradients(again, spec)
    assert found.keys() == expected.keys() == {n for n, _ in kept.module.named_parameters()}
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_bf16_passes_are_near_fp32_ones(family: str) -> None:
    exact, rounded = trained(family), trained(family, precision="bf16", checkpointing=True)
    tokens, conditions = inputs(exact)
    spec = SamplingSpec()
    expected, found = (policy.logprobs(tokens, conditions, spec)[0] for policy in (exact, rounded))
    assert found.dtype == torch.float32
    gap = (found - expected).abs().max()
    assert 1e-5 < gap < 0.2
    theirs, ours = gradients(exact), gradients(rounded)
    whole = torch.cat([theirs[name].flatten() for name in theirs])
    part = torch.cat([ours[name].flatten() for name in theirs])
    assert torch.cosine_similarity(whole, part, dim=0) > 0.99


def test_merged_adapters_are_the_policy_with_adapters(family: str) -> None:
    """Captions, too, whose values are taken from the middle of a layer."""
    policy = trained(family, lora=LoraConfig(rank=3))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    plain = trained(family)
    plain.module.load_state_dict(policy.weights())
    tokens, conditions = inputs(policy)
    expected = token_logprobs(plain.module, tokens, conditions, SamplingSpec())[0]
    found = policy.logprobs(tokens, conditions, SamplingSpec())[0]
    base = token_logprobs(trained(family).module, tokens, conditions, SamplingSpec())[0]
    assert (found - base).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_reference_is_no_part_of_what_is_trained(family: str) -> None:
    policy = trained(family, reference=True)
    with policy.reference() as reference:
        assert not any(p.requires_grad for p in reference.parameters())
        tokens, conditions = inputs(policy)
        theirs = policy.reference_logprobs(reference, tokens, conditions, SamplingSpec())
    ours = policy.logprobs(tokens, conditions, SamplingSpec())[0]
    assert torch.equal(theirs, ours.detach())
    assert not theirs.requires_grad
