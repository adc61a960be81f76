"""The memory of a learner: what autograd really keeps, and whether the largest model fits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from actors.checkpoints.loading import build_policy, count_parameters, init_policy
from actors.checkpoints.zoo import family_of, find_model
from actors.decoding import decode
from actors.decoding.decode import token_logprobs
from actors.models.base import PolicyArchitecture
from actors.models.llamagen import LlamaGenConfig
from actors.models.taming import TamingConfig
from cluster.messages import Condition, SamplingSpec
from learner.capacity import memory
from learner.capacity.memory import LOGITS_KEPT, learner_memory, sampler_memory

SMALL = LlamaGenConfig(
    dim=128, num_layers=4, num_heads=2, grid=12, vocab_size=1024, num_classes=10
)  # fmt: skip
TAMING = TamingConfig(
    dim=128, num_layers=4, num_heads=2, grid=12, vocab_size=1024, num_classes=10, block_size=144
)  # fmt: skip
GB = 1e9


def kept_bytes(config: PolicyArchitecture, rows: int, precision: str, checkpointing: bool) -> int:
    """Storage that autograd holds between forward and backward, but for the weights."""
    policy = init_policy(config).requires_grad_(True)
    policy.checkpointing = checkpointing
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in weights:
            kept[storage] = tensor  # alive, so that its address is not given out again
        return tensor

    tokens = torch.zeros(rows, config.num_tokens, dtype=torch.long)
    given = policy.encode([Condition(text="", class_index=0)] * rows)
    bf16 = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), bf16:
        logprobs, entropies = token_logprobs(policy, tokens, given, SamplingSpec())
        loss = logprobs.mean() - entropies.mean()
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("policy", [SMALL, TAMING], ids=["llamagen", "taming"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(
    policy: PolicyArchitecture, precision: str, checkpointing: bool
) -> None:
    rows = 8
    found = learner_memory(
        policy, microbatch=rows, precision=precision, checkpointing=checkpointing
    )
    logits = LOGITS_KEPT * rows * policy.num_tokens * policy.vocab_size
    expected = found.activations + logits + found.casts
    if checkpointing:  # the layer that is computed again is not there yet
        whole = learner_memory(policy, microbatch=rows, precision=precision, checkpointing=False)
        last = family_of(policy).norm_activations * rows * policy.num_tokens * policy.dim
        expected -= (whole.activations - last) / policy.num_layers + found.casts
    measured = kept_bytes(policy, rows, precision, checkpointing)
    assert measured == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("policy", [SMALL, TAMING], ids=["llamagen", "taming"])
def test_logits_in_pieces_are_not_kept(
    policy: PolicyArchitecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, whole = 8, learner_memory(policy, microbatch=8)
    monkeypatch.setattr(decode, "LOGITS_AT_ONCE", 100 * policy.vocab_size)
    found = learner_memory(policy, microbatch=rows, precision="fp32", checkpointing=False)
    measured = kept_bytes(policy, rows, "fp32", checkpointing=False)
    assert measured == pytest.approx(found.activations, rel=0.06)
    assert found.logits == whole.logits * 100 / (rows * policy.num_tokens)


def test_weights_and_optimizer_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = count_parameters(SMALL)
    one = learner_memory(SMALL, microbatch=4)
    assert (one.weights, one.gradients, one.optimizer) == tuple(
        4 * parameters * k for k in (1, 1, 2)
    )
    four = learner_memory(SMALL, microbatch=4, learners=4, reference=False)
    assert four.optimizer == one.optimizer / 4
    assert (four.reference, one.gathered) == (0, 0)
    d, f, layers = SMALL.dim, SMALL.hidden_dim, SMALL.num_layers
    block = 4 * d * d + 3 * d * f + 2 * d
    outside = parameters - layers * block
    assert four.gathered == 2 * layers * block + 4 * outside + 4 * parameters
    assert (four.weights, four.casts) == (one.weights / 4, 0)
    monkeypatch.setattr(memory, "GATHERED_BELOW", 0)
    large = learner_memory(SMALL, microbatch=4, learners=4, precision="fp32")
    assert large.gathered == 4 * (2 * block + outside + parameters)


def test_guidance_doubles_rows_but_not_what_is_kept_of_the_mixture() -> None:
    plain, guided = (learner_memory(SMALL, microbatch=4, guided=g) for g in (False, True))
    assert guided.activations == 2 * plain.activations
    assert plain.logits < guided.logits < 2 * plain.logits


@pytest.mark.parametrize(
    ("name", "grid", "microbatch", "limit"),
    [
        ("llamagen-xxl-256", 16, 16, 45),
        ("llamagen-xxl-384", 24, 8, 45),
        ("llamagen-xxl-384", 24, 16, 60),
    ],
)
def test_the_largest_policy_fits_80_gb(name: str, grid: int, microbatch: int, limit: float) -> None:
    """144 rollouts an iteration, fp32 weights, gradients, AdamW and reference, bf16 passes with
    checkpointing: what is left is for samplers and scorers."""
    architecture = find_model(name).architecture
    assert isinstance(architecture, LlamaGenConfig)
    assert architecture.grid == grid
    found = learner_memory(architecture, microbatch=microbatch)
    assert found.total < limit * GB
    without = learner_memory(architecture, microbatch=16, checkpointing=False)
    assert without.activations > 5 * found.activations * 16 / microbatch / 2


def test_more_rollouts_of_a_pass_take_more() -> None:
    totals = [learner_memory(SMALL, microbatch=size).total for size in (1, 2, 4)]
    assert totals == sorted(totals)
    assert dataclasses.asdict(learner_memory(SMALL, microbatch=1)).keys() >= {"casts", "logits"}


@pytest.mark.parametrize("policy", [SMALL, TAMING], ids=["llamagen", "taming"])
def test_a_sampler_has_weights_and_a_cache(policy: PolicyArchitecture) -> None:
    module = build_policy(policy)
    weights = sum(p.nbytes for p in module.parameters())
    cache = module.allocate(6).cache.nbytes
    assert sampler_memory(policy, rollouts=6) == weights + cache
    assert sampler_memory(policy, rollouts=3, guided=True) == weights + cache
    assert sampler_memory(policy, rollouts=3, max_groups=2) == weights + cache
    assert sampler_memory(policy, rollouts=6, dtype="bfloat16") == (weights + cache) / 2


@pytest.mark.parametrize(
    ("name", "microbatch", "guided"),
    [
        ("llamagen-xxl-256", 16, False),
        ("llamagen-xxl-256", 16, True),
        ("llamagen-xxl-256", 144, False),
        ("llamagen-xxl-384", 16, False),
    ],
)
def test_the_table_in_the_readme(name: str, microbatch: int, guided: bool) -> None:
    found = learner_memory(find_model(name).architecture, microbatch=microbatch, guided=guided)
    cells = (
        found.weights, found.gradients, found.optimizer, found.reference, found.activations,
        found.logits,
    )  # fmt: skip
    row = " | ".join(f"{value / GB:.1f}" for value in cells)
    assert f"| {row} | **{found.total / GB:.1f}** |" in Path("learner/README.md").read_text()
