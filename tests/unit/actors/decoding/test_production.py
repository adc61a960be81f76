"""What production runs: captured steps in bf16, with a learner under autocast. On a CPU the same
bodies run small, and eagerly."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.checkpoints.loading import PolicyConfig, load_policy
from actors.decoding import steps
from actors.decoding.decode import Decoded, decode_tokens, token_logprobs
from actors.decoding.steps import Workspace, with_null_conditions
from actors.kernels.attention import full_attention
from actors.models.base import Conditions, PolicyModule
from actors.models.llamagen import LlamaGenConfig
from actors.sampler import Sampler, SamplerConfig, SamplerResources
from cluster.messages import Condition, SampleRequest, SamplingSpec
from cluster.program.precision import start_computing
from cluster.weights import load_weights, pack_weights
from tests.unit.helpers import DEVICES, balanced_policy, in_bf16

BF16 = torch.bfloat16
PLAIN, GUIDED = SamplingSpec(), SamplingSpec(cfg_scale=1.5, guidance="guided")
HEAD_DIMS = (64, 80, 100, 104)  # B to XXL, XL by 16 heads, 3B, and 3B as padded


@pytest.fixture(autouse=True)
def _as_every_role_starts() -> None:
    start_computing()


def config(device: str, head_dim: int = 64, captions: bool = False) -> LlamaGenConfig:
    return LlamaGenConfig(
        dim=2 * head_dim,
        num_layers=2,
        num_heads=2,
        grid=4 if device == "cpu" else 16,
        vocab_size=512,
        num_classes=4,
        caption_dim=48 if captions else 0,
        caption_tokens=20,
    )


def asked(policy: PolicyModule, rows: int) -> Conditions:
    generator = np.random.default_rng(0)
    distinct = [
        Condition(text="", class_index=row, features=generator.normal(size=(3 + 5 * row, 48)))
        for row in range(4)
    ]
    return policy.encode([distinct[row % 4] for row in range(rows)])


def draws(policy: PolicyModule, rows: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    shape = rows, policy.num_tokens
    return torch.rand(shape, dtype=torch.float64, generator=generator).to(device)


def decode(
    policy: PolicyModule, device: str, workspace: Workspace, spec: SamplingSpec, rows: int = 24
) -> Decoded:
    uniforms = draws(policy, rows, device)
    return decode_tokens(policy, asked(policy, rows), uniforms, spec, workspace)


def assert_equal(found: Decoded, expected: Decoded) -> None:
    """Bit for bit."""
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.logprobs, expected.logprobs)
    assert torch.equal(found.entropies, expected.entropies)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("captions", [False, True], ids=["classes", "captions"])
@pytest.mark.parametrize("spec", [PLAIN, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_bf16_sampler_and_the_learner_agree(
    head_dim: int, spec: SamplingSpec, captions: bool, device: str
) -> None:
    policy = balanced_policy(config(device, head_dim, captions), gain=2).to(device)
    sampler = in_bf16(policy)
    rows = 8 if device == "cpu" else 24
    decoded = decode(sampler, device, Workspace(sampler, static=True), spec, rows)
    policy.requires_grad_(True)
    with torch.autocast(device, dtype=BF16):
        logprobs, _ = token_logprobs(policy, decoded.tokens.clone(), asked(policy, rows), spec)
    logprobs.mean().backward()
    gap = logprobs.detach() - decoded.logprobs
    print(f"mean {gap.abs().mean():.4f}, k3 {(gap.exp() - 1 - gap).mean():.2e}")
    assert gap.abs().mean() <= 0.03
    assert (gap.exp() - 1 - gap).mean() <= 1e-3
    assert all(p.grad is None or p.grad.isfinite().all() for p in policy.parameters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("captions", [False, True], ids=["classes", "captions"])
def test_decoding_repeats_bit_for_bit(captions: bool, device: str) -> None:
    """Captured, replayed, and captured elsewhere; after other sizes in the same workspace."""
    policy = in_bf16(balanced_policy(config(device, captions=captions)).to(device))
    workspace = Workspace(policy, static=True)
    first = {rows: decode(policy, device, workspace, GUIDED, rows) for rows in (24, 12)}
    for rows in (24, 12, 24):
        assert_equal(decode(policy, device, workspace, GUIDED, rows), first[rows])
    assert_equal(decode(policy, device, Workspace(policy, static=True), GUIDED), first[24])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("captions", [False, True], ids=["classes", "captions"])
def test_weights_that_arrive_between_steps_count_from_the_next_one(
    captions: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured steps read them in place, as eager ones do."""
    monkeypatch.setattr(steps, "WINDOW", 8)
    policy = balanced_policy(config(device, captions=captions)).to(device)
    old = pack_weights(policy.state_dict(), 0)
    new = pack_weights({n: t * 1.1 for n, t in policy.state_dict().items()}, 1)
    conditions = with_null_conditions(policy, asked(policy, 6), GUIDED)
    uniforms = draws(policy, 6, device)

    @torch.inference_mode()
    def run(workspace: Workspace) -> tuple[Tensor, Tensor]:
        load_weights(policy, old)
        found = [workspace.prefill(conditions, uniforms[:, 0], GUIDED)]
        for position in range(1, policy.num_tokens):
            if position == policy.num_tokens // 2:
                load_weights(policy, new)
            found.append(workspace.step(found[-1].tokens, uniforms[:, position], GUIDED))
        return torch.stack([s.tokens for s in found]), torch.stack([s.logprobs for s in found])

    static = Workspace(policy, static=True)
    runs = [run(static) for _ in range(2)]  # the second with steps captured in the first
    tokens, logprobs = run(Workspace(policy, static=False))
    for found in runs:
        assert torch.equal(found[0], tokens)
        assert (found[1] - logprobs).abs().max() <= 1e-4


def request(group: int) -> SampleRequest:
    return SampleRequest(
        stream="train",
        iteration=0,
        group=group,
        condition=Condition(text="", class_index=group),
        num_rollouts=6,
        seed=0,
        spec=PLAIN,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_images_are_decoded_beside_the_first_capture(device: str) -> None:
    """The miniature's networks; images in a thread of their own, as on Ray."""
    weights = pack_weights(load_policy(PolicyConfig()).state_dict(), 1)

    def sampler() -> Sampler:
        resources = SamplerResources(num_gpus=float(device == "cuda"), dtype="bfloat16")
        role = Sampler(SamplerConfig(resources=resources))
        role.load_weights(weights)
        return role

    alone = sampler()
    groups = [alone.sample([request(group)])[0] for group in range(3)]
    images = [alone.images(group)[0] for group in groups]
    beside, ended = sampler(), False
    with ThreadPoolExecutor(1) as thread:

        def decode_images() -> int:
            rounds = 0
            while not ended or not rounds:
                for group, expected in zip(groups, images):
                    assert np.array_equal(beside.images(group)[0], expected)
                rounds += 1
            return rounds

        decoding = thread.submit(decode_images)
        again = [beside.sample([request(group)])[0] for group in range(3)]
        ended = True
        assert decoding.result() >= 1
    for found, expected in zip(again, groups):
        assert np.array_equal(found.tokens, expected.tokens)
        assert np.array_equal(found.logprobs, expected.logprobs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("steps", [64, 192, 576])  # 64 modulo 128: pytorch #196678
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attention_in_bf16_has_the_gradients_of_fp32(
    head_dim: int, masked: bool, steps: int, device: str
) -> None:
    """With scores so low that cuDNN's gradients of the queries were NaN."""
    if device == "cpu" and steps > 64:
        pytest.skip("long for a CPU, whose kernel is another")
    torch.manual_seed(0)
    inputs = [torch.randn(2, 2, steps, head_dim, device=device) for _ in range(3)]
    inputs[0][..., 0], inputs[1][..., 0] = 1, -120 * head_dim**0.5
    mask = None
    if masked:
        seen = torch.ones(steps, steps, dtype=torch.bool, device=device).tril()
        mask = torch.randn(2, 1, 1, steps, device=device).expand(-1, -1, steps, -1)
        mask = mask.masked_fill(~seen, -torch.inf)
    direction = torch.randn_like(inputs[0])

    def run(dtype: torch.dtype) -> list[Tensor]:
        query, key, value = (each.to(BF16).to(dtype).requires_grad_() for each in inputs)
        added = None if mask is None else mask.to(BF16).to(dtype)
        mixed = full_attention(query, key, value, mask=added, causal=mask is None)
        gradients = torch.autograd.grad((mixed * direction).sum(), (query, key, value))
        return [mixed.detach(), *gradients]

    for found, expected in zip(run(BF16), run(torch.float32)):
        assert found.isfinite().all()
        assert (found - expected).abs().mean() <= 0.1 * expected.abs().mean() + 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_fused_kernel_takes_every_shape(head_dim: int, masked: bool, dtype: torch.dtype) -> None:
    """torch's plain products are switched off: it raises where no other backend is left."""
    torch.backends.cuda.enable_math_sdp(False)
    try:
        for queries in (1, 256):
            query = torch.randn(2, 2, queries, head_dim, device="cuda", dtype=dtype)
            key, value = torch.randn(2, 2, 2, 256, head_dim, device="cuda", dtype=dtype)
            mask = torch.zeros(2, 1, 1, 256, device="cuda", dtype=dtype) if masked else None
            full_attention(query, key, value, mask=mask, causal=not masked and queries > 1)
    finally:
        torch.backends.cuda.enable_math_sdp(True)
