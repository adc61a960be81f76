"""What an iteration costs with processes on shared and own GPUs, and what is proposed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from actors.checkpoints.zoo import find_model
from actors.models.vq import VQConfig
from learner.capacity.budget import (
    Budget,
    budget_of,
    changed,
    fitting_shares,
    iteration_seconds,
    proposals,
    together,
)
from learner.capacity.cards import CARDS
from learner.capacity.gpus import Gpu, Process, share_notes
from learner.capacity.seconds import Phase
from learner.capacity.workload import Models
from learner.config import RunConfig, load_preset

CARD = CARDS["h100"]
PHASES = (
    Phase("sample", "sampler", 4.0, "launches"),
    Phase("score", "reward-server", 2.0, "compute"),
    Phase("moments", "moments-server", 0.5, "CPU"),
    Phase("learn", "learner", 3.0, "compute"),
    Phase("load", "sampler", 0.25, "copies"),
)


def gpus(*roles: str) -> list[Gpu]:
    """Each text names the roles of one GPU."""
    return [Gpu([Process(name, 0.25, 1e9, role=name) for name in each.split()]) for each in roles]


def policy_models() -> Models:
    policy, tokenizer = find_model("llamagen-l-256"), VQConfig()
    assert policy.architecture is not None
    assert not isinstance(policy.architecture, VQConfig)
    return Models(policy.architecture, tokenizer)


MODELS = policy_models()


def slow() -> RunConfig:
    """The paper's sizes with settings that a GPU does not like."""
    return changed(
        load_preset("paper-fixed"),
        {
            "sampler.kernels": "torch",
            "learner.compile": "never",
            "sampler.max_groups": 1,
            "sampler.dtype": "float32",
            "sampler.image_dtype": "float32",
            "rewards.clip.precision": "fp32",
            "rewards.hps.precision": "fp32",
            "learner.checkpointing": True,
            "learner.microbatch": 12,
            "learner.num_gpus": 0.5,
            "sampler.num_gpus": 0.25,
            "reward.num_gpus": 0.25,
        },
    )


def test_processes_on_one_gpu_take_turns() -> None:
    together = gpus("sampler reward-server learner")
    assert iteration_seconds(PHASES, together, 4, 0) == 4 + 2 + 0.5 + 3 + 0.25
    # ahead of learning they would still wait for the GPU
    assert iteration_seconds(PHASES, together, 4, 1) == 4 + 2 + 3 + 0.25


def test_processes_on_own_gpus_work_side_by_side() -> None:
    apart = gpus("sampler", "reward-server", "learner")
    assert iteration_seconds(PHASES, apart, 4, 0) == 4 + 2 / 4 + 0.5 + 3 + 0.25
    assert iteration_seconds(PHASES, apart, 4, 1) == 4 + 2 / 4
    two = gpus("sampler reward-server", "learner")
    assert iteration_seconds(PHASES, two, 4, 1) == 4 + 2 + 0.25


def test_two_samplers_on_one_gpu_share_it() -> None:
    shared = [Gpu([Process(f"sampler-{at}", 0.5, 1e9, role="sampler") for at in (0, 1)])]
    assert iteration_seconds(PHASES[:1], shared, 1, 0) == 8


def test_the_paper_as_it_stood_and_as_it_can_be() -> None:
    """8 to 10 s, and 2.3 s, on an H200."""
    h200 = CARDS["h200"]
    assert budget_of(slow(), MODELS, h200).seconds == pytest.approx(9.0, rel=0.2)
    best = together(slow(), MODELS, h200)
    assert best is not None
    assert best.budget.seconds < 4
    assert best.budget.fits
    for name in (
        "sampler.kernels",
        "sampler.max_groups",
        "rewards.hps.precision",
        "learner.checkpointing",
    ):
        assert name in best.changes
    assert not proposals(changed(slow(), best.changes), MODELS, h200)[0].gain > 0.6


def test_the_table_in_the_readme() -> None:
    text, h200 = Path("learner/README.md").read_text(encoding="utf-8"), CARDS["h200"]
    before, after = (
        budget_of(config, MODELS, h200) for config in (slow(), load_preset("paper-fixed"))
    )
    for old, new in zip(before.phases, after.phases, strict=True):
        assert f"| {old.name} | {old.seconds:.2f} | {new.seconds:.2f} |" in text
    assert f"| an iteration | **{before.seconds:.1f}** | **{after.seconds:.1f}** |" in text


def test_proposals_are_computed_ranked_and_fit() -> None:
    config = slow()
    now, found = budget_of(config, MODELS, CARD), proposals(config, MODELS, CARD)
    gains = [each.gain for each in found]
    assert gains == sorted(gains, reverse=True)
    assert any("sampler.max_groups" in each.changes for each in found)
    for each in found:
        assert each.budget.fits
        after = budget_of(changed(config, each.changes), MODELS, CARD)
        assert now.seconds - after.seconds == pytest.approx(each.gain)
    assert "sampler.dtype bfloat16" in {str(each) for each in found}
    assert len({tuple(each.changes) for each in found}) == len(found)  # the best of each


def test_what_does_not_fit_is_not_proposed() -> None:
    """On a card of 24 GB activations of all rollouts fit no share."""
    small = dataclasses.replace(CARD, memory=24e9)
    for each in proposals(slow(), MODELS, small):
        assert each.budget.fits
        size = each.changes.get("learner.microbatch", 12)
        assert "learner.checkpointing" not in each.changes or size < 48


def test_shares_follow_from_needs() -> None:
    config = changed(
        slow(), {"learner.checkpointing": False, "learner.microbatch": 36, "learner.num_gpus": 0.2}
    )
    crowded = budget_of(config, MODELS, CARD)
    assert not crowded.fits
    shares = fitting_shares(config, crowded.gpus, CARD)
    assert sum(shares.values()) == pytest.approx(1)
    after: Budget = budget_of(changed(config, shares), MODELS, CARD)
    assert after.fits
    assert len(after.gpus) == 1
    assert fitting_shares(config, crowded.gpus, dataclasses.replace(CARD, memory=20e9)) == {}


def test_a_process_beyond_its_share_is_named_before_the_start() -> None:
    found = [
        Process("learner", 0.25, 30e9, role="learner"),
        Process("sampler-0", 0.25, 18e9, role="sampler"),
        Process("sampler-1", 0.25, 19e9, role="sampler"),
    ]
    notes = share_notes(found, 80e9)
    assert [note.split()[0] for note in notes] == ["learner", "sampler-1"]
    assert "its share, 0.25 of a GPU of 80 GB, is 20.0" in notes[0]
    assert "num_gpus of at least 0.42, or a smaller learner.microbatch" in notes[0]
    assert share_notes(found, 141e9) == []
