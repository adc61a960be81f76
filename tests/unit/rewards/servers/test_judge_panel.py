"""The panel of evaluations: its networks, and notes on those that rewards use, too."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cluster.messages import MAIN_SPACE
from rewards.config import (
    JUDGE,
    NETWORKS,
    JudgeConfig,
    JudgeHps,
    RewardsConfig,
    RewardServerConfig,
)
from rewards.networks.features import MINIATURE, FeaturesConfig
from rewards.preflight import judge_work, same_networks
from rewards.scorers.clip import ClipConfig, ClipTerm
from rewards.servers.reward_server import RewardServer
from tests.unit.helpers import request

HPS = JudgeHps(enabled=True, model=f"{NETWORKS}/preference", pretrained="")


def test_a_judge_with_hps() -> None:
    """Off by default: the miniature's panel has two figures of its own."""
    assert JudgeConfig().score_names() == ("clip", "accuracy")
    config = RewardServerConfig(rewards=RewardsConfig(), judge=JudgeConfig(hps=HPS))
    assert config.scorer_names()[JUDGE] == ("clip", "hps", "accuracy")
    server = RewardServer(config)
    try:
        images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
        scores = server.score(request(rollouts=3, panel=JUDGE), images)
    finally:
        server.close()
    assert [*scores.scores] == ["clip", "hps", "accuracy"]
    assert [*scores.features] == [MAIN_SPACE, "second"]
    assert [*judge_work(config.judge or JudgeConfig())] == [
        "judge.clip",
        "judge.hps",
        "judge.classifier",
        "judge.features",
        "judge.second",
    ]


def test_a_judge_with_further_spaces() -> None:
    """Their features, their work, and notes on those that a reward uses; the others' as before."""
    clip = FeaturesConfig(network="clip", model=f"{NETWORKS}/judge_clip")
    config = JudgeConfig(further={"clip": clip, "own": FeaturesConfig()})
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    found = []
    for judge in (JudgeConfig(), config):
        server = RewardServer(RewardServerConfig(rewards=RewardsConfig(), judge=judge))
        try:
            found.append(server.score(request(rollouts=3, panel=JUDGE), images).features)
        finally:
            server.close()
    assert [*found[1]] == [MAIN_SPACE, "second", "clip", "own"]
    assert found[1]["clip"].shape == (3, 32)
    for space, values in found[0].items():
        np.testing.assert_array_equal(found[1][space], values)
    assert [*judge_work(config)][-2:] == ["judge.further.clip", "judge.further.own"]
    (note,) = same_networks(RewardsConfig(), config)
    assert note.startswith("judge.further.own is the network of rewards.features (convnet)")
    assert "own/fid is what the distribution reward lowers; fid, in convnet" in note


def test_a_network_of_a_reward_is_no_judge() -> None:
    rewards, judge = RewardsConfig(), JudgeConfig()
    assert same_networks(rewards, judge) == []
    same = replace(judge, clip=ClipConfig(), hps=HPS)
    notes = same_networks(rewards, same)
    assert [note.split(" is ")[0] for note in notes] == ["judge.clip", "judge.hps"]
    assert "Name another model (judge.clip.model, judge.clip.pretrained)" in notes[0]
    logged = replace(rewards, clip=ClipTerm(weight=0))  # a reward that is only logged
    assert len(same_networks(logged, same)) == 1
    shipped = JudgeConfig(features=FeaturesConfig(checkpoint=MINIATURE))
    assert len(same_networks(RewardsConfig(features=FeaturesConfig()), shipped)) == 1


@pytest.mark.parametrize("second", ["dinov2", "inception"])
def test_a_judges_fid_in_the_rewards_space(second: str) -> None:
    inception = FeaturesConfig(network="inception")
    rewards = RewardsConfig(features=inception)
    other = FeaturesConfig(network=second)  # type: ignore[arg-type]
    note, *also = same_networks(rewards, JudgeConfig(features=inception, second=other))
    assert [each[:12] for each in also] == ["judge.second"] * (second == "inception")
    assert "the figure fid is what the distribution reward lowers" in note
    assert ("second/fid, in dinov2" in note) == (second == "dinov2")
    assert ("name another" in note) == bool(also)
