"""Heads are padded for the kernels that need it, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from actors.decoding.decode import decode_tokens
from actors.decoding.steps import Workspace
from actors.kernels import attention
from actors.kernels.attention import full_attention, padded_head_dim
from actors.models import layers
from actors.models.base import PolicyModule
from actors.models.llamagen import LlamaGen, LlamaGenConfig
from actors.models.taming import TamingConfig, TamingGPT
from cluster.messages import Condition, SamplingSpec
from cluster.program.precision import start_computing

LLAMAGEN = LlamaGenConfig(dim=40, num_layers=2, num_heads=2, grid=3, vocab_size=20, num_classes=4)
TAMING = TamingConfig(
    dim=30, num_layers=2, num_heads=2, grid=3, vocab_size=20, num_classes=4, block_size=9
)
"""Head dimensions 20 and 15."""


@pytest.mark.parametrize(
    ("head_dim", "device", "expected"),
    [
        (64, "cuda", 64),
        (80, "cuda", 80),
        (100, "cuda", 104),  # LlamaGen-3B
        (104, "cuda", 104),
        (4, "cuda", 8),
        (100, "cpu", 100),
    ],
)
def test_head_dimensions_of_fused_kernels(head_dim: int, device: str, expected: int) -> None:
    assert padded_head_dim(head_dim, device) == expected


def masks(batch: int, steps: int, kind: str) -> Tensor | None:
    seen = torch.ones(steps, steps, dtype=torch.bool).tril()
    if kind == "bool":
        return seen
    if kind == "added":  # a caption's: another bias in each row
        bias = torch.randn(batch, 1, 1, steps).expand(-1, -1, steps, -1)
        return bias.masked_fill(~seen, -torch.inf)
    return None


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "added"])
@pytest.mark.parametrize(("head_dim", "width"), [(100, 104), (20, 24), (15, 16), (4, 64)])
def test_padded_heads_have_the_same_values_and_gradients(
    head_dim: int, width: int, kind: str
) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(3, 2, 7, head_dim, requires_grad=True) for _ in range(3)]
    mask, direction = masks(3, 7, kind), torch.randn(3, 2, 7, head_dim)

    def run(padded: int | None) -> list[Tensor]:
        query, key, value = inputs
        mixed = full_attention(
            query, key, value, mask=mask, causal=kind == "causal", head_dim=padded
        )
        return [mixed, *torch.autograd.grad((mixed * direction).sum(), inputs)]

    plain, padded = run(None), run(width)
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=kind == "causal")
    assert torch.equal(plain[0], expected)
    for found, other in zip(padded, plain):
        assert found.shape == other.shape
        torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("config", [LLAMAGEN, TAMING], ids=["llamagen", "taming"])
def test_policies_with_padded_heads_are_the_same(
    config: LlamaGenConfig | TamingConfig, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: teacher forcing, and decoding from a padded cache."""
    torch.manual_seed(0)
    policy: PolicyModule = (
        LlamaGen(config) if isinstance(config, LlamaGenConfig) else TamingGPT(config)
    ).eval()
    conditions = policy.encode([Condition(text="", class_index=row) for row in range(4)])
    tokens = torch.randint(0, 20, (4, 9))
    draws = torch.rand(4, 9, dtype=torch.float64)

    def decode() -> tuple[Tensor, Tensor]:
        workspace = Workspace(policy, static=static)
        decoded = decode_tokens(policy, conditions, draws, SamplingSpec(), workspace)
        return decoded.tokens, decoded.logprobs

    expected, decoded = policy(tokens, conditions), decode()
    width = padded_head_dim(config.head_dim, "cuda")
    for module in (attention, layers):
        monkeypatch.setattr(module, "padded_head_dim", lambda head_dim, device: width)
    assert policy.allocate(4).cache.shape[-1] == width > config.head_dim
    torch.testing.assert_close(policy(tokens, conditions), expected, rtol=1e-4, atol=1e-4)
    padded = decode()
    assert torch.equal(padded[0], decoded[0])
    torch.testing.assert_close(padded[1], decoded[1], rtol=1e-4, atol=1e-4)


def test_a_process_that_computes_leaves_cudnn_out() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        start_computing()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
