"""Whole policies decode the same tokens with Triton's kernels and with plain PyTorch, and one
static step serves every position."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from actors.decoding.decode import Decoded, decode_tokens
from actors.decoding.steps import Workspace
from actors.kernels import plain
from actors.kernels.interface import Kernels
from actors.models.base import PolicyModule
from actors.models.llamagen import LlamaGenConfig
from actors.models.taming import TamingConfig, TamingGPT
from cluster.messages import Condition, SamplingSpec
from tests.unit.helpers import SPECS, TINY, random_policy

pytest.importorskip("triton", reason="Triton exists on Linux only")
from actors.kernels import fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 2
CLASSES = dataclasses.replace(TINY, grid=2)
CAPTIONS = dataclasses.replace(CLASSES, caption_dim=12, caption_tokens=7)
HEAD_100 = dataclasses.replace(CLASSES, dim=200, num_layers=1)
TAMING = TamingConfig(
    dim=24, num_layers=2, num_heads=2, grid=2, vocab_size=20, num_classes=4, block_size=8
)
COORDINATES = dataclasses.replace(
    TAMING, condition="coordinates", image_size=4, coordinate_stride=2, coordinate_levels=9
)


def made(config: LlamaGenConfig | TamingConfig) -> PolicyModule:
    if isinstance(config, LlamaGenConfig):
        return random_policy(config).to(DEVICE)
    torch.manual_seed(0)
    policy = TamingGPT(config)
    with torch.no_grad():
        policy.pos_emb.normal_()
        policy.head.weight.normal_()
    return policy.requires_grad_(False).to(DEVICE)


def decode(policy: PolicyModule, spec: SamplingSpec, workspace: Workspace) -> Decoded:
    features = np.random.default_rng(0).normal(size=(ROWS, 5, 12))
    asked = [
        Condition(text="", class_index=row, features=features[row, : 1 + 2 * row])
        for row in range(ROWS)
    ]
    shape, generator = (ROWS, policy.num_tokens), torch.Generator().manual_seed(3)
    uniforms = torch.rand(shape, dtype=torch.float64, generator=generator).to(DEVICE)
    return decode_tokens(policy, policy.encode(asked), uniforms, spec, workspace)


def assert_same(found: Decoded, expected: Decoded) -> None:
    assert torch.equal(found.tokens, expected.tokens)
    assert (found.logprobs - expected.logprobs).abs().max() <= 1e-4
    assert (found.entropies - expected.entropies).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("config", "spec"),
    [
        (CLASSES, "plain"), (CLASSES, "guided, filtered"), (CAPTIONS, "guided"),
        (HEAD_100, "temperature"), (TAMING, "plain"), (COORDINATES, "top_k"),
    ],
    ids=["classes", "classes, filtered", "captions", "head 100", "taming", "coordinates"],
)  # fmt: skip
def test_tokens_are_those_of_plain_pytorch(
    config: LlamaGenConfig | TamingConfig, spec: str
) -> None:
    policy = made(config)
    expected = decode(policy, SPECS[spec], Workspace(policy, kernels=plain))
    workspace = Workspace(policy, static=True, kernels=fused)
    assert_same(decode(policy, SPECS[spec], workspace), expected)
    assert [len(steps) for steps in workspace._steps.values()] == [1]


@pytest.mark.parametrize("kernels", [plain, fused], ids=["plain", "fused"])
def test_a_workspace_follows_weights_that_were_written_or_replaced(kernels: Kernels) -> None:
    """Written in place, a step stays; with memory of their own, it is captured again."""
    policy, spec = random_policy(CLASSES).to(DEVICE), SamplingSpec()
    other = random_policy(CLASSES, seed=1).to(DEVICE)
    workspace = Workspace(policy, static=True, kernels=kernels)
    fresh = decode(other, spec, Workspace(other, kernels=plain))
    assert not torch.equal(decode(policy, spec, workspace).tokens, fresh.tokens)
    captured = list(workspace._steps.values())
    policy.load_state_dict(other.state_dict())
    assert_same(decode(policy, spec, workspace), fresh)
    assert list(workspace._steps.values()) == captured
    replaced = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    policy.load_state_dict(replaced, assign=True)
    assert_same(decode(policy, spec, workspace), fresh)
    assert list(workspace._steps.values()) != captured


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 100, 104])
def test_one_captured_graph_decodes_what_eager_steps_do(head_dim: int, dtype: torch.dtype) -> None:
    """Twice, so that it is replayed, too; and the same tokens each time."""
    config = LlamaGenConfig(dim=4 * head_dim, num_layers=2, num_heads=4, grid=16)
    policy, workspaces = random_policy(config).to(DEVICE, dtype), []
    for static in (False, True, True):
        workspaces.append(Workspace(policy, static=static, kernels=fused))
        decoded = [decode(policy, SPECS["guided"], workspaces[-1]) for _ in range(2)]
        assert_same(decoded[1], decoded[0])
        assert_same(decoded[0], decode(policy, SPECS["guided"], workspaces[0]))
        assert len(workspaces[-1]._steps) == static
