"""New weights in the middle of a group: which weights drew which token, and what is kept of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from actors.checkpoints.loading import PolicyConfig
from actors.decoding.decode import Decoded, decode_tokens, rollout_uniforms
from actors.decoding.steps import Workspace
from actors.models.llamagen import LlamaGen, LlamaGenConfig
from actors.sampler import Sampler, SamplerConfig
from cluster.errors import CheckpointError, ConfigError, FleetError
from cluster.messages import SampleRequest, ScoredGroup
from cluster.weights import load_weights, pack_weights
from learner.fleet_plan import fleet_plan
from learner.grpo.advantage import group_advantages
from learner.monitoring.metrics import rollout_table
from learner.rollouts.codec import pack_group, unpack_group
from rewards.combine import Combiner, RewardTerm
from tests.small_run import small_config
from tests.unit.helpers import TINY, random_policy, request, scored_group, tiny_policy
from tests.unit.learner.rollouts.test_prefetch import PaperFleet, pipeline
from tests.unit.learner_cases import tiny_policy_file

AT = 4  # of TINY's nine tokens
WIDE = LlamaGenConfig(dim=256, num_layers=1, num_heads=2, grid=3, vocab_size=256, num_classes=4)
"""Layers of 65,536 weights, which a CPU packs."""


def by_two_policies(
    old: LlamaGen, new: LlamaGen, asked: SampleRequest, at: int, given: np.ndarray
) -> np.ndarray:
    """Logprobs (K, T) of given tokens: the first `at` by one policy, the others by another that
    goes on with its cache. The raw distribution, by hand."""
    conditions = old.encode([asked.condition] * asked.num_rollouts)
    tokens = torch.from_numpy(given.astype(np.int64))
    found = []
    with torch.inference_mode():
        state = old.allocate(len(tokens))
        logits = old.prefill(state, conditions)
        for place in range(tokens.shape[1]):
            if place:
                policy = old if place < at else new
                logits = policy.decode_step(state, tokens[:, place - 1])
            scores = logits.double().numpy()
            whole = np.log(np.exp(scores - scores.max(1, keepdims=True)).sum(1))
            chosen = scores[np.arange(len(scores)), given[:, place]] - scores.max(1)
            found.append(chosen - whole)
    return np.stack(found, axis=1)


def decoded(policy: LlamaGen, asked: SampleRequest, hook: object = None, **more: object) -> Decoded:
    draws = rollout_uniforms(asked.seed, asked.key, asked.num_rollouts, policy.num_tokens)
    given = policy.encode([asked.condition] * asked.num_rollouts)
    uniforms = torch.from_numpy(draws)
    return decode_tokens(policy, given, uniforms, asked.spec, between_steps=hook, **more)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("config", [TINY, WIDE], ids=["tiny", "packed"])
def test_weights_swapped_between_tokens_draw_the_later_ones(
    config: LlamaGenConfig, static: bool
) -> None:
    old, new, policy = (random_policy(config, seed) for seed in (0, 1, 0))
    asked, places = request(group=1, rollouts=6), []

    def swap(place: int) -> None:
        places.append(place)
        if place == AT:
            with torch.inference_mode(False):
                load_weights(policy, pack_weights(new.state_dict(), 1))

    mixed = decoded(policy, asked, swap, workspace=Workspace(policy, static=static))
    assert places == list(range(1, config.num_tokens))
    first, last = decoded(old, asked), decoded(new, asked)
    assert torch.equal(mixed.tokens[:, :AT], first.tokens[:, :AT])
    assert not torch.equal(mixed.tokens[:, AT:], first.tokens[:, AT:])
    assert not torch.equal(mixed.tokens[:, AT:], last.tokens[:, AT:])
    expected = by_two_policies(old, new, asked, AT, mixed.tokens.numpy())
    np.testing.assert_allclose(mixed.logprobs.numpy(), expected, atol=2e-5)
    # and not those of a cache made anew by the new weights
    forward = torch.log_softmax(new(mixed.tokens, new.encode([asked.condition] * 6)), -1)
    anew = forward.gather(-1, mixed.tokens.unsqueeze(-1)).squeeze(-1)
    assert (anew[:, AT:] - mixed.logprobs[:, AT:]).abs().max() > 1e-2


def sampler(folder: Path, take_up: str) -> Sampler:
    policy = PolicyConfig(checkpoint=tiny_policy_file(folder))
    return Sampler(SamplerConfig(policy=policy, take_up=take_up), "sampler-1")


def offers(role: Sampler, versions: dict[int, list[int]]) -> None:
    """Have snapshots (seed = version) offered before certain tokens are drawn."""
    take_up, calls = role._take_up_offered, []

    def look() -> None:
        for version in versions.get(len(calls), []):
            assert role.offer_weights(snapshot(version)) == version
        calls.append(None)
        take_up()

    role._take_up_offered = look


def snapshot(version: int):
    return pack_weights(tiny_policy(version).state_dict(), version)


def test_a_sampler_takes_up_the_newest_offer_and_records_who_drew_what(tmp_path: Path) -> None:
    role = sampler(tmp_path, "token")
    role.load_weights(snapshot(1))
    # older than what is held; two at once, of which the newer counts, whichever comes last
    offers(role, {2: [0], AT: [3, 2], 7: [5]})
    asked = request(rollouts=4)
    (group,) = role.sample([asked])
    assert (group.version, group.newest, role.version) == (1, 5, 5)
    assert group.token_versions.tolist() == [1, 1, 1, 1, 3, 3, 3, 5, 5]
    assert group.token_versions.dtype == np.int32
    assert group.mixed_share == pytest.approx(5 / 9)
    pure = decoded(tiny_policy(1), asked).tokens[:, :AT].numpy()
    assert np.array_equal(group.tokens[:, :AT], pure)
    by_hand = by_two_policies(tiny_policy(1), tiny_policy(3), asked, AT, group.tokens)
    np.testing.assert_allclose(group.logprobs[:, :7], by_hand[:, :7], atol=2e-5)
    assert [span.phase for span in group.spans] == ["load", "load", "load", "sample"]

    assert role.load_weights(snapshot(4)) == 5  # at least these: it holds newer ones
    (after,) = role.sample([asked])
    assert (after.version, after.token_versions, after.mixed_share) == (5, None, 0.0)
    role.offer_weights(snapshot(6))  # while nothing is drawn
    assert role.sample([asked])[0].version == 6


def test_a_damaged_offer_is_refused_where_it_is_taken_up(tmp_path: Path) -> None:
    role = sampler(tmp_path, "token")
    role.load_weights(snapshot(1))
    bad = snapshot(2)
    bad.buffer[100] ^= 4
    role.offer_weights(bad)
    with pytest.raises(CheckpointError, match="snapshot 2 is damaged"):
        role.sample([request()])
    assert role.version == 1


def test_by_default_weights_change_between_groups_alone(tmp_path: Path) -> None:
    role = sampler(tmp_path, "group")
    role.load_weights(snapshot(1))
    calls: list[None] = []
    role._take_up_offered = lambda: calls.append(None)
    assert role.sample([request()])[0].token_versions is None
    assert len(calls) == 1
    with pytest.raises(CheckpointError, match="holds version 1 and refuses the older 0"):
        role.load_weights(snapshot(0))


def test_on_policy_refuses_it() -> None:
    with pytest.raises(ConfigError, match=r"weights.take_up token needs max_staleness >= 1"):
        small_config(weights={"take_up": "token"})
    config = small_config(weights={"take_up": "token"}, max_staleness=1)
    assert fleet_plan(config).sampler.config.take_up == "token"
    assert fleet_plan(config).sampler.goes_ahead


def mixed(group: ScoredGroup, version: int, versions: list[int] | None) -> ScoredGroup:
    each = None if versions is None else np.array(versions, np.int32)
    rollouts = dataclasses.replace(group.rollouts, version=version, token_versions=each)
    return dataclasses.replace(group, rollouts=rollouts)


@pytest.mark.parametrize(
    ("version", "versions", "accepted"),
    [
        (1, None, True),
        (1, [1, 1, 2, 2], True),
        (2, None, True),
        (0, None, False),  # older than the rule says
        (0, [0, 0, 1, 2], False),
        (1, [1, 1, 2, 3], False),  # newer than there is
        (3, None, False),
    ],
)
@pytest.mark.parametrize("take_up", ["token", "group"])
def test_tokens_may_be_newer_than_the_rule_says_but_never_older(
    take_up: str, version: int, versions: list[int] | None, accepted: bool
) -> None:
    """Iteration 2 with S = 1, whose rule says 1, when 2 updates are live."""
    fleet = PaperFleet()
    made = pipeline(1, fleet, weights={"take_up": take_up})
    made.begin(0)
    for iteration in range(2):
        made.take(iteration)
        fleet.version = iteration + 1
        made.release(iteration)
    ticket = next(i for i, g in fleet._answers.items() if g[0].rollouts.request.iteration == 2)
    fleet._answers[ticket] = [mixed(g, version, versions) for g in fleet._answers[ticket]]
    if accepted and (take_up == "token" or (version, versions) == (1, None)):
        assert len(made.take(2)) == 4
    else:
        until = " to 2" if take_up == "token" else ""
        with pytest.raises(
            FleetError, match=rf"iteration 2 is to be drawn with those of 1{until}$"
        ):
            made.take(2)


def test_checkpoints_and_records_keep_the_versions_of_tokens() -> None:
    plain = mixed(scored_group({"clip": [0.1, 0.2]}), 3, None)
    fresh = mixed(scored_group({"clip": [0.1, 0.2]}, group=1), 3, [3, 3, 4, 4])
    for group in (plain, fresh):
        back = unpack_group(group.rollouts.request, pack_group(group)).rollouts
        assert np.array_equal(back.token_versions, group.rollouts.token_versions)
        assert back.newest == group.rollouts.newest
    for groups, kept in (([plain, fresh], [None] * 2 + [[3, 3, 4, 4]] * 2), ([plain], [None] * 2)):
        advantages = group_advantages(groups, {}, Combiner({"clip": RewardTerm()}))
        table = rollout_table(0, groups, advantages, 0)
        assert table["token_versions"].to_pylist() == kept
        assert table["policy_version"].to_pylist() == [3] * len(kept)
        assert table.schema.field("token_versions").type == pa.list_(pa.int32())
