"""Static caches, windows, packed weights, captions: all are the same distribution."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from actors.decoding import steps
from actors.decoding.decode import Decoded, decode_tokens, token_logprobs
from actors.decoding.steps import Workspace
from actors.models.base import Conditions
from actors.models.layers import Linear
from actors.models.llamagen import LlamaGen, LlamaGenConfig
from cluster.errors import DataError
from cluster.messages import Condition, SamplingSpec
from cluster.weights import load_weights, pack_weights
from tests.unit.helpers import SPECS, random_policy

CAPTIONS = LlamaGenConfig(
    dim=32, num_layers=2, num_heads=2, grid=3, vocab_size=20, caption_dim=12, caption_tokens=7
)
WIDE = LlamaGenConfig(dim=256, num_layers=2, num_heads=4, grid=4, vocab_size=300, num_classes=4)
"""Wide enough that its weights are packed."""
LONG = LlamaGenConfig(dim=32, num_layers=2, num_heads=2, grid=5, vocab_size=20, num_classes=4)
HEAD_100 = LlamaGenConfig(dim=200, num_layers=1, num_heads=2, grid=3, vocab_size=20, num_classes=4)
"""Head dimension of the 3B model."""


def captions(*lengths: int, width: int = 12) -> list[Condition]:
    generator = np.random.default_rng(0)
    return [
        Condition(text=str(length), features=generator.normal(size=(length, width)))
        for length in lengths
    ]


def asked(config: LlamaGenConfig, rows: int) -> list[Condition]:
    if config.caption_dim:
        distinct = captions(1, 7, 3)
        return [distinct[row % 3] for row in range(rows)]
    return [Condition(text="", class_index=row % config.num_classes) for row in range(rows)]


def uniforms(policy: LlamaGen, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(rows, policy.num_tokens, dtype=torch.float64, generator=generator)


def decode(
    policy: LlamaGen, spec: SamplingSpec, workspace: Workspace | None = None, rows: int = 6
) -> Decoded:
    conditions = policy.encode(asked(policy.config, rows))
    return decode_tokens(policy, conditions, uniforms(policy, rows), spec, workspace)


def assert_same(found: Decoded, expected: Decoded, tolerance: float = 1e-5) -> None:
    assert torch.equal(found.tokens, expected.tokens)
    assert (found.logprobs - expected.logprobs).abs().max() <= tolerance
    assert (found.entropies - expected.entropies).abs().max() <= tolerance


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("config", [CAPTIONS, WIDE, HEAD_100], ids=["captions", "wide", "head 100"])
def test_cached_decoding_equals_teacher_forcing(config: LlamaGenConfig, name: str) -> None:
    policy = random_policy(config)
    decoded = decode(policy, SPECS[name])
    conditions = policy.encode(asked(config, 6))
    logprobs, entropies = token_logprobs(policy, decoded.tokens, conditions, SPECS[name])
    assert (decoded.logprobs - logprobs).abs().max() <= 1e-4
    assert (decoded.entropies - entropies).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["plain", "guided, filtered"])
@pytest.mark.parametrize("config", [LONG, CAPTIONS], ids=["classes", "captions"])
def test_static_steps_equal_steps_over_the_filled_slots(
    config: LlamaGenConfig, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph captures, run eagerly; windows of 8 slots, so that several are crossed."""
    monkeypatch.setattr(steps, "WINDOW", 8)
    policy = random_policy(config)
    workspace = Workspace(policy, static=True)
    live = decode(policy, SPECS[name])
    for _ in range(2):
        assert_same(decode(policy, SPECS[name], workspace), live)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain", "guided, filtered"])
@pytest.mark.parametrize("config", [LONG, CAPTIONS, HEAD_100], ids=["classes", "captions", "3b"])
def test_captured_steps_equal_teacher_forcing(
    config: LlamaGenConfig, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "WINDOW", 8)
    policy = random_policy(config).cuda()
    workspace, spec = Workspace(policy), SPECS[name]
    for _ in range(2):  # captured, then replayed
        conditions = policy.encode(asked(config, 6))
        decoded = decode_tokens(policy, conditions, uniforms(policy, 6).cuda(), spec, workspace)
        logprobs, entropies = token_logprobs(policy, decoded.tokens, conditions, spec)
        assert (decoded.logprobs - logprobs).abs().max() <= 1e-4
        assert (decoded.entropies - entropies).abs().max() <= 1e-4


@pytest.mark.parametrize("static", [False, True])
def test_a_workspace_serves_any_batch_spec_and_captions(static: bool) -> None:
    policy = random_policy(CAPTIONS)
    workspace = Workspace(policy, static=static)
    for name, rows in (("plain", 6), ("guided", 6), ("plain", 2), ("top_k", 2), ("guided", 3)):
        assert_same(
            decode(policy, SPECS[name], workspace, rows), decode(policy, SPECS[name], None, rows)
        )
    for lengths in ((7, 7), (1, 2)):  # the same shapes, another bias
        conditions = policy.encode(captions(*lengths))
        draws = uniforms(policy, 2)
        spec = SamplingSpec()
        fresh = decode_tokens(policy, conditions, draws, spec)
        assert_same(decode_tokens(policy, conditions, draws, spec, workspace), fresh)


@pytest.mark.parametrize("batch", [1, 7, 16])
@pytest.mark.parametrize("config", [WIDE, CAPTIONS], ids=["wide", "captions"])
def test_draws_do_not_depend_on_batch_placement(config: LlamaGenConfig, batch: int) -> None:
    policy, rows = random_policy(config), 32
    conditions, draws = policy.encode(asked(config, rows)), uniforms(policy, rows)
    whole = decode_tokens(policy, conditions, draws, SamplingSpec()).tokens
    parts = [
        decode_tokens(policy, conditions[at : at + batch], draws[at : at + batch], SamplingSpec())
        for at in range(0, rows, batch)
    ]
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole)


def test_a_shared_caption_is_computed_once_and_counts_the_same() -> None:
    policy = random_policy(CAPTIONS)
    first, second = captions(4, 6)
    shared = policy.encode([first, first, second, first])
    assert shared.values.shape == (2, 7, 12)
    assert len(shared) == 4
    tokens = torch.randint(0, 20, (4, policy.num_tokens))
    rows = [shared.values[shared.value_index()], shared.mask[shared.value_index()]]  # type: ignore[index]
    torch.testing.assert_close(policy(tokens, shared), policy(tokens, Conditions(*rows)))
    part = shared[1:2]
    assert part.values.shape == (1, 7, 12)
    torch.testing.assert_close(policy(tokens[1:2], part), policy(tokens, shared)[1:2])


def test_padding_of_a_caption_has_no_effect() -> None:
    """The same caption in a policy that allows longer ones."""
    longer = LlamaGenConfig(
        dim=32, num_layers=2, num_heads=2, grid=3, vocab_size=20, caption_dim=12, caption_tokens=30
    )
    small, large = random_policy(CAPTIONS), random_policy(longer)
    state = small.state_dict()
    del state["cls_embedding.uncond_embedding"]
    large.load_state_dict(state, strict=False)
    tokens, caption = torch.randint(0, 20, (1, 9)), captions(5)
    torch.testing.assert_close(
        small(tokens, small.encode(caption)), large(tokens, large.encode(caption))
    )


@pytest.mark.parametrize(
    ("config", "condition", "message"),
    [
        (CAPTIONS, Condition(text="a cat"), "'a cat' carries no features: encode captions"),
        (CAPTIONS, captions(8)[0], r"shape \(8, 12\), expected 1 to 7 tokens of width 12"),
        (CAPTIONS, captions(3, width=5)[0], r"shape \(3, 5\), expected 1 to 7 tokens of width 12"),
        (WIDE, Condition(text="a cat"), "'a cat' has no class_index"),
        (WIDE, Condition(text="x", class_index=4), r"class_index 4, but .* 4 classes \(0 to 3\)"),
        (WIDE, Condition(text="x", class_index=-1), "class_index -1"),
    ],
)
def test_conditions_that_do_not_fit_are_named(
    config: LlamaGenConfig, condition: Condition, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        LlamaGen(config).encode([condition])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_weights_follow_every_write(dtype: torch.dtype, bias: bool) -> None:
    layer = Linear(256, 512, bias=bias).to(dtype)
    x = torch.randn(5, 1, 256, dtype=dtype)
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}

    def check(of: Linear) -> None:
        with torch.inference_mode():
            torch.testing.assert_close(of(x), F.linear(x, of.weight, of.bias), **tolerance)

    check(layer)
    with torch.no_grad():
        layer.weight.mul_(2)
    check(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(x).float().square().mean().backward()
    optimizer.step()
    check(layer)
    load_weights(layer, pack_weights({n: t * 3 for n, t in layer.state_dict().items()}, 1))
    check(layer)
    layer.load_state_dict({name: t - 1 for name, t in layer.state_dict().items()})
    check(layer)
    layer.to(torch.float64).to(dtype)
    check(layer)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.neg_()
    check(twin)
    check(layer)
    assert set(layer.state_dict()) == ({"weight", "bias"} if bias else {"weight"})


def test_a_workspace_sees_new_weights() -> None:
    policy, other = random_policy(WIDE), random_policy(WIDE, seed=1)
    workspace = Workspace(policy)
    before = decode(policy, SamplingSpec(), workspace)
    load_weights(policy, pack_weights(other.state_dict(), 1))
    after = decode(policy, SamplingSpec(), workspace)
    assert not torch.equal(after.tokens, before.tokens)
    assert_same(after, decode(other, SamplingSpec()))


def test_bf16_weights_give_fp32_logits_near_those_of_fp32() -> None:
    policy = random_policy(WIDE)
    half = copy.deepcopy(policy).to(torch.bfloat16)
    decoded = decode(half, SPECS["guided"])
    assert decoded.logprobs.dtype == torch.float32
    conditions = policy.encode(asked(WIDE, 6))
    exact, _ = token_logprobs(policy, decoded.tokens, conditions, SPECS["guided"])
    assert (decoded.logprobs - exact).abs().mean() < 0.1
