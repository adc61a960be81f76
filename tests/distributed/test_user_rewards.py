"""Rewards of the user's own on real Ray: as in one process, whatever they do; and how they fail."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import FleetError
from cluster.messages import GroupScores
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.session import RaySession
from cluster.roles import FleetPlan
from learner.fleet_plan import fleet_plan
from rewards.servers.reward_server import RewardServer
from tests.bench.reward_server import ROLLOUTS, plan, requests
from tests.small_run import small_config
from tests.stand_ins import instant_images

OFF = {"enabled": False}
OWN = """\
import os

import numpy as np
import torch

torch.set_default_dtype(torch.float64)


class Own:
    def __init__(self, device: str) -> None:
        self.net = torch.nn.Linear(3, 1)  # of the seed that building it has

    def __call__(self, images, conditions):
        with torch.no_grad():
            return self.net(torch.tensor(images, dtype=torch.float64).mean((1, 2))).squeeze(1)


class Dies:
    def __init__(self, device: str) -> None:
        pass

    def __call__(self, images, conditions):
        os._exit(7)


class CannotStart:
    def __init__(self, device: str) -> None:
        raise SystemExit("no licence\\nfor this machine")

    def __call__(self, images, conditions):
        pass


class Waits:
    def __init__(self, device: str) -> None:
        pass

    def __call__(self, images, conditions):
        import time

        time.sleep(600)
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "rewards.py"
    file.write_text(OWN)
    return file


def plan_of(extra: list[str], *, apart: bool = False, timeout_s: float = 0.0) -> FleetPlan:
    """Instant samplers, and reward servers with rewards of the user's own alone."""
    rewards = {"clip": OFF, "hps": OFF, "extra": extra, "features": {"network": "pixels"}}
    pools = {"apart": {"runtime_env": {"env_vars": {"WHO": "7"}}}} if apart else {}
    config = small_config(rewards=rewards, reward_pools=pools, evaluation={"num_images": 0})
    config = dataclasses.replace(config, rewards=config.rewards.with_files())
    whole = fleet_plan(config)
    server = whole.reward_server
    if timeout_s:
        quick = dataclasses.replace(server.config, timeout_s=timeout_s)
        server = dataclasses.replace(server, config=quick)
    return dataclasses.replace(
        plan(1, 0.0), reward_server=server, reward_pools=whole.reward_pools, max_restarts=1
    )


def run(whole: FleetPlan, session: RaySession) -> list[GroupScores]:
    with RayFleet(whole, session) as fleet:
        return [group.scores for group in fleet.collect(fleet.submit(requests(4)))]


def test_scores_are_those_of_one_process_whatever_rewards_do(
    ray_session: RaySession, own: Path
) -> None:
    """The file is gone when the servers start: its text travels."""
    extra = [
        "tests.hostile:Spoils=0",
        "tests.hostile:Ends=0,how=exit",
        "tests.hostile:Reuses=0",
        f"{own}:Own=1",
    ]
    whole = plan_of(extra)
    own.unlink()
    found = run(whole, ray_session)
    server = RewardServer(whole.reward_server.config)
    images = instant_images(ROLLOUTS)
    for request, scores in zip(requests(4), found, strict=True):
        expected = server.score(request, images)
        assert scores.errors == expected.errors == (None,) * len(images)
        for name, values in expected.scores.items():
            np.testing.assert_array_equal(scores.scores[name], values)
        for space, values in expected.features.items():
            np.testing.assert_array_equal(scores.features[space], values)


def test_a_reward_that_ends_its_process_is_reported_after_a_bounded_number_of_tries(
    ray_session: RaySession, own: Path
) -> None:
    told = (
        r"^reward-server was lost \(its process ended .*\), after 1 replacements in an hour: look "
        r"at its log"
    )
    with pytest.raises(FleetError, match=told):
        run(plan_of([f"{own}:Dies=1"]), ray_session)


@pytest.mark.slow
def test_a_reward_that_cannot_start_in_a_pool_of_its_own_is_one_message(
    ray_session: RaySession, own: Path
) -> None:
    with pytest.raises(FleetError) as caught:
        run(plan_of([f"{own}:CannotStart=1,pool=apart"], apart=True), ray_session)
    assert str(caught.value) == (
        f"reward-apart could not start: rewards.extra: {own}:CannotStart cannot be built: "
        "SystemExit: no licence for this machine (rewards.py, line 28)"
    )


@pytest.mark.slow
def test_a_reward_that_never_answers_is_named(ray_session: RaySession, own: Path) -> None:
    told = (
        r"^reward-server does not get on: reward-server has been at group \d of train 0 \(scorer "
        r"waits\) for \d+ s \(--timeout-s sets the bound\), after 1 replacements in an hour"
    )
    with pytest.raises(FleetError, match=told):
        run(plan_of([f"{own}:Waits=1"], timeout_s=1.0), ray_session)
