"""The memory of a learner: what autograd really keeps, and whether the largest model fits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from actors.decode import token_logprobs
from actors.models.base import Conditions
from actors.models.llamagen import LlamaGen, LlamaGenConfig
from actors.models.loading import count_parameters
from actors.models.zoo import named
from cluster.messages import SamplingSpec
from learner.memory import LAST_NORM, LOGITS_KEPT, learner_memory

SMALL = LlamaGenConfig(
    dim=128, num_layers=4, num_heads=2, grid=12, vocab_size=1024, num_classes=10
)  # fmt: skip
GB = 1e9


def kept_bytes(config: LlamaGenConfig, rows: int, precision: str, checkpointing: bool) -> int:
    """Storage that autograd holds between forward and backward, but for the weights."""
    policy = LlamaGen(config)
    policy.checkpointing = checkpointing
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in weights:
            kept[storage] = tensor  # alive, so that its address is not given out again
        return tensor

    tokens = torch.zeros(rows, config.num_tokens, dtype=torch.long)
    given = Conditions(torch.zeros(rows, dtype=torch.long))
    bf16 = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), bf16:
        logprobs, entropies = token_logprobs(policy, tokens, given, SamplingSpec())
        loss = logprobs.mean() - entropies.mean()
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(precision: str, checkpointing: bool) -> None:
    rows = 8
    found = learner_memory(SMALL, microbatch=rows, precision=precision, checkpointing=checkpointing)
    logits = LOGITS_KEPT * rows * SMALL.num_tokens * SMALL.vocab_size
    expected = found.activations + logits + found.casts
    if checkpointing:  # the layer that is computed again is not there yet
        whole = learner_memory(SMALL, microbatch=rows, precision=precision, checkpointing=False)
        last = LAST_NORM * rows * SMALL.num_tokens * SMALL.dim
        expected -= (whole.activations - last) / SMALL.num_layers + found.casts
    measured = kept_bytes(SMALL, rows, precision, checkpointing)
    assert measured == pytest.approx(expected, rel=0.06)


def test_weights_and_optimizer_by_hand() -> None:
    parameters = count_parameters(SMALL)
    one = learner_memory(SMALL, microbatch=4)
    assert (one.weights, one.gradients, one.optimizer) == tuple(
        4 * parameters * k for k in (1, 1, 2)
    )
    four = learner_memory(SMALL, microbatch=4, learners=4, reference=False)
    assert four.optimizer == one.optimizer / 4
    assert (four.reference, one.exchange) == (0, 0)


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
    architecture = named(name).architecture
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
