"""Guards, each provoked; figures by hand."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.errors import LearningError
from cluster.spans import Span
from learner.monitoring.guards import Findings, Guards, SlowServers, scoring_times, slow_servers
from learner.training.learner import Learner
from learner.training.skips import GuardsConfig, too_many_skipped
from tests.unit.learner_cases import batch_of, make, tiny_policy_file, weights

SOUND = {
    "groups/flat": 1,
    "reward_std/clip": 0.2,
    "reward_std/loo_fid": 0.02,
    "policy/entropy": 2.0,
    "policy/base_entropy": 2.5,
    "policy/reference_kl": 0.1,
    "policy/mismatch_kl": 1e-9,
}


def watch(guards: Guards, *changes: dict) -> list[Findings]:
    return [guards({"iteration": i, **SOUND, **each}) for i, each in enumerate(changes)]


@pytest.mark.parametrize(
    ("updates", "stop"),
    [
        ([True, True], False),  # fewer than three
        ([True, True, True], True),  # 3 of 3
        ([False] * 12 + [True] * 3, False),  # 3 of 15 is the share itself
        ([False] * 11 + [True] * 3, True),  # 3 of 14 is above
        ([True] * 4 + [False] * 16, False),  # 4 of 20
        ([True] * 5 + [False] * 15, True),
        ([True] * 5 + [False] * 16, False),  # the oldest is forgotten
    ],
)
def test_share_of_skipped_updates(updates: list[bool], stop: bool) -> None:
    assert too_many_skipped(GuardsConfig(), updates) is stop


def test_one_skipped_update_may_be_one_too_many() -> None:
    strict = GuardsConfig(max_skipped_share=0, min_skipped=1)
    assert too_many_skipped(strict, [False, True])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_skipped_share": 1.5}, r"max_skipped_share must be in \[0, 1\], found 1.5"),
        ({"window": 0}, "window must be >= 1, found 0"),
        ({"window": 2}, "min_skipped must be at most window, found 3 and 2"),
        ({"min_entropy_share": 1.0}, "min_entropy_share must be in"),
        ({"max_reference_kl": 0}, "must be > 0, found 0"),
        ({"kl": "shout"}, "kl must be off, warn or stop, found 'shout'"),
        ({"min_reward_std": math.nan}, "min_reward_std must be >= 0"),
    ],
)
def test_impossible_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuardsConfig(**changes)


BAD = {
    "reward_flat": ({"groups/flat": 4}, "all rewards were equal within every group"),
    "entropy_low": ({"policy/entropy": 0.74}, r"0\.3 of the base policy's \(0\.74 of 2\.5 nats"),
    "kl_high": ({"policy/reference_kl": 3.1}, r"policy/reference_kl 3\.1 is above"),
}


@pytest.mark.parametrize("name", BAD)
def test_each_guard_counts_warns_once_and_stops(name: str) -> None:
    bad, message = BAD[name]
    field = name.partition("_")[0]
    patient = GuardsConfig(patience=2, **{field: "warn"})
    found = watch(Guards(patient, groups=4), bad, bad, bad, {}, bad, bad)
    counts = [findings.metrics[f"guards/{name}"] for findings in found]
    assert counts == [1, 2, 3, 0, 1, 2]
    notes = [findings.notes for findings in found]
    assert [len(each) for each in notes] == [0, 1, 0, 0, 0, 0]
    assert notes[1][0].startswith("iteration 1: for 2 iterations, ")
    for findings in found:
        findings.enforce()
    first, second = watch(Guards(dataclasses.replace(patient, **{field: "stop"}), 4), bad, bad)
    first.enforce()
    with pytest.raises(LearningError, match=f"iteration 1: for 2 iterations, .*{message}"):
        second.enforce()
    off = watch(Guards(dataclasses.replace(patient, **{field: "off"}), 4), bad, bad, bad)
    assert not any(findings.notes or findings.stop for findings in off)


def test_one_dead_reward_is_named() -> None:
    dead = {"reward_std/clip": 0.0}
    (found,) = watch(Guards(GuardsConfig(patience=1), groups=4), dead)
    assert "the reward clip had the same value for every image" in found.notes[0]


@pytest.mark.parametrize(
    "row",
    [
        {"groups/flat": 3},  # of four
        {"reward_std/clip": math.nan},  # no image was scored: another guard's
        {"policy/entropy": 0.75},  # the share itself
        {"policy/entropy": math.nan},
        {"policy/reference_kl": 3.0},
        {"policy/mismatch_kl": math.inf},  # of a filter that rounded differently
    ],
)
def test_what_is_not_bad(row: dict) -> None:
    (found,) = watch(Guards(GuardsConfig(patience=1), groups=4), row)
    assert set(found.metrics.values()) == {0}


def test_under_distil_samplers_differ_on_purpose() -> None:
    away = {"policy/mismatch_kl": 1.5}
    config = GuardsConfig(patience=1)
    assert watch(Guards(config, 4), away)[0].stop
    assert not watch(Guards(config, 4, one_policy=False), away)[0].stop


def test_a_resumed_run_remembers() -> None:
    config, bad = GuardsConfig(patience=3), {"policy/reference_kl": 9.0, "policy/entropy": 0.1}
    straight = watch(Guards(config, 4), {}, bad, bad, bad)
    resumed = Guards(config, 4)
    resumed.replay([{"iteration": i, **SOUND, **each} for i, each in enumerate([{}, bad, bad])])
    assert resumed({"iteration": 3, **SOUND, **bad}) == straight[3]
    assert straight[3].stop
    assert straight[3].notes
    told = Guards(config, 4)
    told.replay([{"iteration": i, **SOUND, **bad} for i in range(3)])
    assert not told({"iteration": 3, **SOUND, **bad}).notes


def spans_of(**seconds: float) -> list[Span]:
    named = {name.replace("_", "-"): s for name, s in seconds.items()}
    return [Span(name, "score", 100.0, 100.0 + s) for name, s in named.items()]


def test_slow_servers_by_hand() -> None:
    spans = [
        *spans_of(reward_server_0=1.0, reward_server_1=2.0, reward_server_2=9.0),
        Span("reward-server-0", "score", 0.0, 3.0),
        Span("reward-server-0", "queue", 0.0, 50.0),
        *spans_of(reward_big_0=60.0),  # alone in its pool
    ]
    times = scoring_times(spans)
    assert times == pytest.approx(
        {"reward-server-0": 2, "reward-server-1": 2, "reward-server-2": 9, "reward-big-0": 60}
    )
    assert slow_servers(times) == {}  # 4.5 times
    assert slow_servers({**times, "reward-server-2": 10.5}) == {"reward-server-2": 2.0}
    quick = {"reward-server-0": 0.01, "reward-server-1": 0.4}
    assert slow_servers(quick) == {}  # below the floor


def test_a_slow_server_is_named_once_when_it_stays_slow() -> None:
    slow = SlowServers(patience=2)
    late = spans_of(reward_server_0=0.1, reward_server_1=2.0)
    fine = spans_of(reward_server_0=0.1, reward_server_1=0.1)
    said = [slow(spans) for spans in (late, fine, late, late, late)]
    assert [len(lines) for lines in said] == [0, 0, 0, 1, 0]
    assert said[3][0].startswith(
        "reward-server-1 takes 2 s for a batch, where the others of its pool take 0.1 s"
    )


@pytest.fixture
def policy_file(tmp_path: Path) -> str:
    return tiny_policy_file(tmp_path)


def broken(learner: Learner, iteration: int) -> object:
    """A batch with one advantage that is not finite."""
    batch = batch_of(learner, iteration)
    advantages = batch.advantages.copy()
    advantages[3] = np.nan
    return dataclasses.replace(batch, advantages=advantages)


def test_an_update_that_is_not_finite_is_left_out(policy_file: str) -> None:
    learner = make(policy_file)
    learner.start(base_entropy=2.9)
    assert learner.step(batch_of(learner)).metrics["guards/skipped_updates"] == 0
    weights_before = weights(learner).clone()
    report = learner.step(broken(learner, 1))
    assert report.version == 2
    assert report.metrics["guards/skipped_updates"] == 1
    assert math.isnan(report.metrics["loss/surrogate"])
    assert torch.equal(weights(learner), weights_before)
    whole = make(policy_file)  # whose optimizer never saw the broken batch
    whole.start(base_entropy=2.9)
    whole.step(batch_of(whole))
    batch = batch_of(learner, 2)
    learner.step(batch)
    whole.step(dataclasses.replace(batch, versions=np.ones(8, np.int64)))
    assert torch.equal(weights(learner), weights(whole))


def test_the_run_stops_at_the_third_in_a_row_also_when_resumed(
    policy_file: str, tmp_path: Path
) -> None:
    learner = make(policy_file)
    for iteration in range(2):
        learner.step(broken(learner, iteration))
    (tmp_path / "saved").mkdir()
    learner.save(tmp_path / "saved")
    resumed = make(policy_file)
    resumed.restore(tmp_path / "saved")
    for each in (learner, resumed):
        with pytest.raises(LearningError, match="3 of the last 3 updates were left out"):
            each.step(broken(each, 2))
