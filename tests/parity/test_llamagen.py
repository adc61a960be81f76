"""LlamaGen against outputs of the official code, fp32 on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from actors.distribution import guided_logits
from actors.models.base import Conditions
from actors.models.llamagen import LlamaGen, LlamaGenConfig
from cluster.messages import Condition
from cluster.model_files.tensors import load_strict
from tests.parity.compare import (
    check_close,
    check_compared,
    check_distribution,
    check_greedy,
    greedy_runs,
    sampling_specs,
)
from tests.parity.reference import TINY_WIDTH, Reference

Branches = Callable[[str], tuple[Tensor, Tensor]]

FAMILY = "llamagen-gpt"
FEW = 48  # greedy tokens: three rows of 16; all of them with --slow
TOLERANCES = {1.0: (3e-5, 2e-4), 2.0: (1e-4, 5e-4), 4.0: (2e-4, 1e-3)}
"""Guidance scale up to -> absolute tolerance of tiny models, of full width."""


def tolerance(reference: Reference, cfg_scale: float) -> float:
    pair = next(pair for limit, pair in TOLERANCES.items() if cfg_scale <= limit)
    return pair[reference.model["dim"] > TINY_WIDTH]


@pytest.fixture(scope="module")
def policy(reference: Reference) -> LlamaGen:
    model = reference.model
    config = LlamaGenConfig(
        dim=model["dim"],
        num_layers=model["n_layer"],
        num_heads=model["n_head"],
        grid=round(model["block_size"] ** 0.5),
        vocab_size=model.get("vocab_size", 16384),
        num_classes=model.get("num_classes", 1000),
        caption_dim=model.get("caption_dim", 2048) if model.get("model_type") == "t2i" else 0,
        caption_tokens=model.get("cls_token_num", 120),
        norm_eps=model.get("norm_eps", 1e-5),
        rope_base=model.get("rope_base", 10000.0),
    )
    policy = LlamaGen(config)
    load_strict(policy, reference.state(), reference.path.name)
    return policy.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def conditions(policy: LlamaGen, reference: Reference) -> Conditions:
    """Classes, or captions as a text encoder gives them: unpadded."""
    arrays = reference.arrays
    if "labels" in arrays:
        asked = [Condition(text="", class_index=int(label)) for label in arrays["labels"]]
    else:
        lengths = arrays["emb_mask"].sum(1).astype(int)
        asked = [
            Condition(text="", features=features[-length:])
            for features, length in zip(arrays["caption_emb"], lengths)
        ]
    return policy.encode(asked)


@pytest.fixture(scope="module")
def branches(policy: LlamaGen, conditions: Conditions, reference: Reference) -> Branches:
    """Teacher-forced logits of both branches, for a set of given tokens by its name."""

    @cache
    def forced(name: str) -> tuple[Tensor, Tensor]:
        tokens = reference.tensor(name)
        null = policy.null_conditions(conditions)
        return policy(tokens, conditions), policy(tokens, null)

    return forced


@pytest.mark.parametrize("name", ["logits_cond", "logits_uncond", "logits_cfg1.5", "logits_cfg4"])
def test_logits(branches: Branches, reference: Reference, name: str) -> None:
    conditional, unconditional = branches("tokens")
    positions, columns = reference.tensor("positions"), reference.tensor("columns")
    scale = float(name.partition("cfg")[2] or 1)
    logits = unconditional if name == "logits_uncond" else conditional
    if scale > 1:
        logits = guided_logits(conditional, unconditional, scale)
    found, expected = logits[:, positions][:, :, columns], reference.tensor(f"tokens/{name}")
    check_close(found, expected, tolerance(reference, scale), name)


@pytest.mark.parametrize("branch", ["lse_cond", "lse_uncond"])
@pytest.mark.parametrize("given", ["tokens", "tokens_guided"])
def test_logsumexp_over_the_whole_vocabulary(
    branches: Branches, reference: Reference, given: str, branch: str
) -> None:
    logits, expected = (
        branches(given)[branch == "lse_uncond"],
        reference.tensor(f"{given}/{branch}"),
    )
    check_close(logits.logsumexp(-1), expected, tolerance(reference, 1.0), branch)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("given", ["tokens", "tokens_guided"])
def test_logprobs_entropies_and_supports(
    branches: Branches, reference: Reference, given: str, every: bool
) -> None:
    """Under every spec; at full width, where each takes a second, under every third."""
    conditional, unconditional = branches(given)
    every = every or reference.model["dim"] <= TINY_WIDTH
    rows = list(sampling_specs(reference))[:: 1 if every else 3]
    compared = 0
    for index, spec in rows:
        mixed = conditional
        if spec.guided_sampling:
            mixed = guided_logits(conditional, unconditional, spec.cfg_scale)
        bound = tolerance(reference, spec.cfg_scale)
        compared += check_distribution(reference, given, (index, spec), mixed, bound)[0]
    least = 0.4 * reference.tensor(given).numel() * len(rows)
    check_compared(reference, compared, least)


@pytest.mark.parametrize("length", [FEW, pytest.param(None, marks=pytest.mark.slow)])
def test_greedy_decoding_with_the_cache(
    policy: LlamaGen, conditions: Conditions, reference: Reference, length: int | None
) -> None:
    compared = 0
    for name, fields in greedy_runs(reference).items():
        scale, interval = fields["cfg_scale"], fields.get("cfg_interval", -1)
        tokens = greedy(policy, conditions, scale, interval, length or policy.num_tokens)
        compared += check_greedy(reference, name, tokens)
    check_compared(reference, compared, 1)


@torch.inference_mode()
def greedy(
    policy: LlamaGen, conditions: Conditions, scale: float, interval: int, length: int
) -> torch.Tensor:
    """The most likely token at each of the first `length` positions; `interval` guides tokens 0 to
    interval + 1 alone."""
    branches = 2 if scale > 1 else 1
    rows = conditions.concat(policy.null_conditions(conditions)) if scale > 1 else conditions
    state = policy.allocate(len(rows))
    logits = policy.prefill(state, rows)
    columns: list[torch.Tensor] = []
    for position in range(min(length, policy.num_tokens)):
        if position:
            logits = policy.decode_step(state, columns[-1].repeat(branches))
        conditional, *unconditional = logits.chunk(branches)
        if unconditional and (interval < 0 or position <= interval + 1):
            conditional = guided_logits(conditional, unconditional[0], scale)
        columns.append(conditional.argmax(-1))
    return torch.stack(columns, 1)
