"""LlamaGen against outputs of the official code, fp32 on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from actors.distribution import guided_logits, log_distribution
from actors.models.base import Conditions
from actors.models.llamagen import LlamaGen, LlamaGenConfig
from cluster.messages import Condition, SamplingSpec
from cluster.tensors import load_strict
from tests.parity.reference import TINY_WIDTH, Reference

FAMILY = "llamagen-gpt"
TOLERANCES = {1.0: (3e-5, 2e-4), 2.0: (1e-4, 5e-4), 4.0: (2e-4, 1e-3)}
"""Guidance scale up to -> absolute tolerance of tiny models, of full width."""
DECIDED = 1e-4  # a top-k or nucleus decision closer than this may flip


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
        vocab_size=model["vocab_size"],
        num_classes=model.get("num_classes", 1000),
        caption_dim=model["caption_dim"] if model["model_type"] == "t2i" else 0,
        caption_tokens=model.get("cls_token_num", 120),
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
def branches(
    policy: LlamaGen, conditions: Conditions, reference: Reference
) -> dict[str, tuple[Any, Any]]:
    """Teacher-forced logits of both branches, for both sets of given tokens."""
    return {
        name: (
            policy(reference.tensor(name), conditions),
            policy(reference.tensor(name), policy.null_conditions(conditions)),
        )
        for name in ("tokens", "tokens_guided")
    }


def test_logits(branches: dict, reference: Reference) -> None:
    conditional, unconditional = branches["tokens"]
    positions, columns = reference.tensor("positions"), reference.tensor("columns")
    cases = {
        "logits_cond": (conditional, 1.0),
        "logits_uncond": (unconditional, 1.0),
        "logits_cfg1.5": (guided_logits(conditional, unconditional, 1.5), 1.5),
        "logits_cfg4": (guided_logits(conditional, unconditional, 4.0), 4.0),
    }
    for name, (logits, scale) in cases.items():
        expected = reference.tensor(f"tokens/{name}")
        found = logits[:, positions][:, :, columns]
        assert (found - expected).abs().max() <= tolerance(reference, scale), name


@pytest.mark.parametrize("given", ["tokens", "tokens_guided"])
def test_logsumexp_over_the_whole_vocabulary(
    branches: dict, reference: Reference, given: str
) -> None:
    for logits, name in zip(branches[given], ("lse_cond", "lse_uncond")):
        expected = reference.tensor(f"{given}/{name}")
        assert (logits.logsumexp(-1) - expected).abs().max() <= tolerance(reference, 1.0)


@pytest.mark.parametrize("given", ["tokens", "tokens_guided"])
def test_logprobs_entropies_and_supports(branches: dict, reference: Reference, given: str) -> None:
    conditional, unconditional = branches[given]
    tokens = reference.tensor(given)
    compared = 0
    for index, fields in enumerate(reference.config["specs"]):
        scale = fields["cfg_scale"]
        spec = SamplingSpec(
            temperature=fields["temperature"],
            top_k=fields["top_k"],
            top_p=fields["top_p"],
            cfg_scale=scale,
            guidance="none" if scale == 1 else "guided",
        )
        mixed = conditional if scale == 1 else guided_logits(conditional, unconditional, scale)
        logp, entropy = log_distribution(mixed, spec)
        picked = logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).numpy()
        gaps = [reference.arrays[f"{given}/{kind}_gap"][index] for kind in ("topk", "nucleus")]
        decided = np.all([np.isnan(gap) | (gap > DECIDED) for gap in gaps], axis=0)
        expected = reference.arrays[f"{given}/logp"][index]
        bound = tolerance(reference, scale) / fields["temperature"]
        assert (np.isfinite(picked) == np.isfinite(expected))[decided].all()
        inside = decided & np.isfinite(expected)
        compared += int(inside.sum())
        np.testing.assert_allclose(picked[inside], expected[inside], rtol=0, atol=bound)
        np.testing.assert_allclose(
            entropy.numpy()[decided],
            reference.arrays[f"{given}/entropy"][index][decided],
            rtol=0,
            atol=bound,
        )
        support = (logp > -torch.inf).sum(-1).numpy()
        np.testing.assert_array_equal(
            support[decided], reference.arrays[f"{given}/support"][index][decided]
        )
    assert compared >= 0.4 * tokens.numel() * len(reference.config["specs"])


def test_greedy_decoding_with_the_cache(
    policy: LlamaGen, conditions: Conditions, reference: Reference
) -> None:
    for name, fields in reference.config["greedy"].items():
        scale, interval = fields["cfg_scale"], fields.get("cfg_interval", -1)
        tokens = greedy(policy, conditions, scale, interval)
        expected = reference.tensor(f"{name}/tokens")
        for row, margins in enumerate(reference.arrays[f"{name}/margin"]):
            close = np.flatnonzero(margins <= 1e-3)
            sure = close[0] if len(close) else len(margins)
            assert torch.equal(tokens[row, :sure], expected[row, :sure]), name


@torch.inference_mode()
def greedy(policy: LlamaGen, conditions: Conditions, scale: float, interval: int) -> torch.Tensor:
    """The most likely token at each position; `interval` guides tokens 0 to interval + 1 alone."""
    branches = 2 if scale > 1 else 1
    rows = conditions.and_then(policy.null_conditions(conditions)) if scale > 1 else conditions
    state = policy.allocate(len(rows))
    logits = policy.prefill(state, rows)
    columns: list[torch.Tensor] = []
    for position in range(policy.num_tokens):
        if position:
            logits = policy.decode_step(state, columns[-1].repeat(branches))
        conditional, *unconditional = logits.chunk(branches)
        if unconditional and (interval < 0 or position <= interval + 1):
            conditional = guided_logits(conditional, unconditional[0], scale)
        columns.append(conditional.argmax(-1))
    return torch.stack(columns, 1)
