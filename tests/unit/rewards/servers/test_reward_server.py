"""The role in this process: batching across callers, statistics, bad input, pools."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cluster.errors import ConfigError, DataError
from cluster.messages import Condition
from learner.data.digits import captions, digits
from rewards.config import BatchingConfig, RewardsConfig, RewardServerConfig
from rewards.servers.reward_server import RewardServer
from tests.unit.helpers import request

CONDITIONS = [Condition(text=text, class_index=index) for index, text in enumerate(captions())]
TOGETHER = BatchingConfig(max_batch=32, max_wait_ms=200.0)


def make(**options: object) -> RewardServer:
    return RewardServer(RewardServerConfig(judge=None, **options))


@pytest.fixture(scope="module")
def server() -> RewardServer:
    return make()


@pytest.fixture(scope="module")
def batching() -> RewardServer:
    return make(batching=TOGETHER)


def groups(count: int, size: int = 4) -> list[tuple]:
    images, labels = digits("held-out")
    return [
        (
            request(group=g, rollouts=size, condition=CONDITIONS[labels[g]]),
            images[g * size : (g + 1) * size],
        )
        for g in range(count)
    ]


def test_callers_at_once_are_scored_together_with_the_same_scores(
    server: RewardServer, batching: RewardServer
) -> None:
    asked = groups(8)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda pair: batching.score(*pair), asked))
    stats = batching.stats()
    assert stats.requests == 8
    assert stats.images == 32
    assert stats.batches < 8  # the point of it
    for (asked_for, images), found in zip(asked, together):
        alone = server.score(asked_for, images)
        assert found.key == asked_for.key
        for name, values in alone.scores.items():
            np.testing.assert_allclose(found.scores[name], values, atol=1e-6)
        np.testing.assert_allclose(found.features["features"], alone.features["features"], 1e-5)
    phases = [span.phase for found in together for span in found.spans]
    assert phases.count("queue") == 8
    assert phases.count("score") == stats.batches  # a batch is one span, whoever is in it


def test_bad_images_among_those_of_other_callers(batching: RewardServer) -> None:
    (asked, images), (other, others) = groups(2)
    bad = [images[0], images[1].astype(float), images[2][:1, :1], images[3]]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(batching.score, asked, bad)
        second = pool.submit(batching.score, other, others)
        mixed, clean = first.result(60), second.result(60)
    assert [error is None for error in mixed.errors] == [True, False, False, True]
    assert clean.errors == (None,) * 4
    assert np.isfinite(clean.scores["clip"]).all()
    assert batching.stats().failed == 2


def test_an_empty_request_is_refused_and_the_server_lives(server: RewardServer) -> None:
    asked, images = groups(1)[0]
    with pytest.raises(DataError, match="must be non-empty: a request without images"):
        server.score(asked, images[:0])
    assert server.score(asked, images).errors == (None,) * 4


def test_an_unknown_panel_is_refused(server: RewardServer) -> None:
    with pytest.raises(DataError, match=r"has no panel 'judge': it has rewards"):
        server.score(request(rollouts=1, panel="judge"), np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match="no panel 'judge'"):
        server.fingerprint("judge")


def test_a_pool_runs_its_own_scorers_alone() -> None:
    rewards = RewardsConfig(
        extra=("tests.stand_ins:Brightness=0.5,pool=apart,name=light",), features_pool="apart"
    )
    asked, images = groups(1)[0]
    main = make(rewards=rewards).score(asked, images)
    apart_server = make(rewards=rewards, pool="apart")
    apart = apart_server.score(asked, images)
    assert (list(main.scores), list(main.features)) == (["clip", "hps"], [])
    assert (list(apart.scores), list(apart.features)) == (["light"], ["features"])
    np.testing.assert_allclose(apart.scores["light"], images.mean((1, 2, 3)) / 255, rtol=1e-5)
    with pytest.raises(DataError, match="runs no feature network for the panel 'rewards'"):
        make(rewards=rewards).fingerprint("rewards")


def test_scorers_are_warm_before_the_server_is_there() -> None:
    """The stand-in refuses to score before it was warmed."""
    rewards = RewardsConfig(extra=("tests.stand_ins:Brightness",))
    asked, images = groups(1)[0]
    assert make(rewards=rewards).score(asked, images).errors == (None,) * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere.at_all:Thing", "nowhere.at_all:Thing cannot be imported where reward servers"),
        ("tests.stand_ins:Missing", "there is no 'Missing' in it"),
        ("tests.stand_ins:Brightness=1,shade=3", r"called with \(device, shade\).*unexpected"),
        ("pathlib:PurePath.joinpath", r"called with \(device\)"),
        (
            "tests.unit.rewards.servers.test_reward_server:gives_a_number",
            "gives a int, which cannot be called",
        ),
    ],
)
def test_what_is_no_scorer_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(rewards=RewardsConfig(extra=(text,)))


def gives_a_number(device: str) -> int:
    return 3


def test_the_dimension_of_its_features_is_known(server: RewardServer) -> None:
    images = np.zeros((3, 8, 8, 3), np.uint8)
    assert server.feature_dim("rewards") == server.features(images, "rewards")["features"].shape[1]
