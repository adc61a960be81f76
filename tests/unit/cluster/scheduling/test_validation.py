"""PendingBatch that are not what was asked for, one by one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from cluster.errors import ConfigError, FleetError
from cluster.fleet import InlineFleet
from cluster.messages import MAIN_SPACE, GroupScores, RequestKey, SamplingSpec
from cluster.scheduling.validation import ScoreChecks, check_rollouts, check_scores
from learner.config import RunConfig
from learner.fleet_plan import fleet_plan
from rewards.servers.reward_server import RewardServer
from tests.small_run import run_training, small_config
from tests.unit.helpers import request, scored_group

SOUND = scored_group({"clip": [0.1, 0.2, 0.3]}, group=1)
ASKED = SOUND.rollouts.request


def scores(**changes: object) -> GroupScores:
    return dataclasses.replace(SOUND.scores, **changes)


BAD = {
    "another group": (scores(key=RequestKey("train", 0, 2)), "was asked for .*group=1.*group=2"),
    "fewer images": (scores(errors=(None, None)), "given 3 images, and answered for 2"),
    "no score": (scores(scores={}), "scores of none, expected clip"),
    "one too many": (
        scores(scores={**SOUND.scores.scores, "hps": np.zeros(3, np.float32)}),
        "scores of clip, hps, expected clip",
    ),
    "a column": (
        scores(scores={"clip": np.zeros((3, 1), np.float32)}),
        r"scorer 'clip': expected \(3,\) float32, found \(3, 1\) float32",
    ),
    "a list": (scores(scores={"clip": [0.1, 0.2, 0.3]}), "expected .*, found list"),
    "whole numbers": (scores(scores={"clip": np.zeros(3, int)}), r"found \(3,\) int64"),
    "NaN": (
        scores(scores={"clip": np.array([0, np.nan, 0], np.float32)}),
        "scorer 'clip': 1 of 3 values are not finite, and no error says why",
    ),
    "features of fewer": (
        scores(features={MAIN_SPACE: np.zeros((2, 4), np.float32)}),
        r"features 'features': expected \(3, D\) float32, found \(2, 4\) float32",
    ),
    "features in a row": (
        scores(features={MAIN_SPACE: np.zeros(3, np.float32)}),
        r"expected \(3, D\) float32, found \(3,\) float32",
    ),
    "no feature": (
        scores(features={MAIN_SPACE: np.zeros((3, 0), np.float32)}),
        "at least one column",
    ),
    "inf": (
        scores(features={MAIN_SPACE: np.full((3, 2), np.inf, np.float32)}),
        "6 of 6 values are not finite",
    ),
    "something else": ({"clip": 1.0}, "answered with dict, expected GroupScores"),
}


@pytest.mark.parametrize("what", BAD)
def test_wrong_scores_are_refused_by_name(what: str) -> None:
    answer, message = BAD[what]
    with pytest.raises(FleetError, match=f"reward-server-2.*{message}"):
        check_scores(answer, ASKED, "reward-server-2", ("clip",))


def test_what_is_right_passes() -> None:
    check_scores(SOUND.scores, ASKED, "reward-server", ("clip",))
    check_scores(SOUND.scores, ASKED, "reward-server", None)
    spaces = tuple(SOUND.scores.features)
    check_scores(SOUND.scores, ASKED, "reward-server", ("clip",), spaces)
    with pytest.raises(FleetError, match="of the spaces features, expected clip, features"):
        check_scores(SOUND.scores, ASKED, "reward-server", ("clip",), (*spaces, "clip"))
    failed = scores(
        scores={"clip": np.array([np.nan, 1, 2], np.float32)},
        features={MAIN_SPACE: np.array([[np.nan], [1], [2]], np.float32)},
        errors=("clip: not finite", None, None),
    )
    check_scores(failed, ASKED, "reward-server", ("clip",))


def test_features_keep_their_length_within_pool_and_panel() -> None:
    check = ScoreChecks()
    two, four = (scores(features={MAIN_SPACE: np.zeros((3, dim), np.float32)}) for dim in (2, 4))
    judged = request(1, panel="judge")
    check(two, ASKED, pool="reward-server", worker="a")
    check(four, judged, pool="reward-server", worker="a")
    check(four, ASKED, pool="reward-other", worker="b")
    none = scores(
        scores={"clip": np.full(3, np.nan, np.float32)},
        features={MAIN_SPACE: np.zeros((3, 0), np.float32)},
        errors=("bad",) * 3,
    )
    check(none, ASKED, pool="reward-server", worker="a")
    with pytest.raises(FleetError, match=r"c, features 'features': expected 2 columns, found \(3"):
        check(four, ASKED, pool="reward-server", worker="c")


ROLLOUTS = SOUND.rollouts
WRONG_ROLLOUTS = {
    "of another spec": (
        {"request": dataclasses.replace(ASKED, spec=SamplingSpec(temperature=0.5))},
        "was asked for .*temperature=1.0.*, and answered .*temperature=0.5",
    ),
    "fewer": ({"tokens": ROLLOUTS.tokens[:2]}, r"tokens: expected \(3, T\) int32, found \(2, 4\)"),
    "floats": ({"tokens": ROLLOUTS.tokens.astype(float)}, r"found \(3, 4\) float64"),
    "none": ({"tokens": ROLLOUTS.tokens[:, :0]}, r"found \(3, 0\) int32"),
    "below 0": ({"tokens": ROLLOUTS.tokens - 99}, "tokens must be >= 0"),
    "shorter logprobs": (
        {"logprobs": ROLLOUTS.logprobs[:, :3]},
        r"logprobs: expected \(3, 4\) float32, found \(3, 3\) float32",
    ),
    "NaN": ({"entropies": ROLLOUTS.entropies * np.nan}, "entropies: 12 of 12 values"),
    "probabilities": ({"logprobs": ROLLOUTS.logprobs + 2}, "logprobs <= 0 .* up to 1"),
}


@pytest.mark.parametrize("what", WRONG_ROLLOUTS)
def test_wrong_rollouts_are_refused(what: str) -> None:
    changes, message = WRONG_ROLLOUTS[what]
    check_rollouts(ROLLOUTS, ASKED, "sampler-3")
    with pytest.raises(FleetError, match=f"sampler-3.*{message}"):
        check_rollouts(dataclasses.replace(ROLLOUTS, **changes), ASKED, "sampler-3")


def test_names_that_servers_answer_with() -> None:
    roles = fleet_plan(RunConfig()).servers
    assert [role.scorers for role in roles] == [
        {"rewards": ("clip", "hps"), "judge": ("clip", "accuracy")}
    ]


def test_roles_on_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for role, name in (("sampler", "sampler"), ("reward", "reward-server"), ("learner", "learner")):
        config = small_config(**{role: {"num_gpus": 0.5}})
        with pytest.raises(ConfigError, match=f"{name}: num_gpus asks for a GPU, .* set num_gpus"):
            InlineFleet(fleet_plan(config))


def test_a_run_stops_at_a_wrongly_shaped_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    score = RewardServer.score

    def flat(server, request, images):
        found = score(server, request, images)
        return dataclasses.replace(found, scores={k: v[:, None] for k, v in found.scores.items()})

    monkeypatch.setattr(RewardServer, "score", flat)
    config = small_config()
    with (
        InlineFleet(fleet_plan(config)) as fleet,
        pytest.raises(FleetError, match=r"reward-server, scorer 'clip': expected \(4,\) float32"),
    ):
        run_training(config, fleet)
