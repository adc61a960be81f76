"""Fleets of evaluations on real Ray: no learner, any number of samplers, deaths in the middle."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.errors import FleetError
from cluster.fleet import InlineFleet
from cluster.messages import GroupScores
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.session import RaySession
from cluster.scheduling.pool import State, WorkerPool
from learner.evaluation.held_out import evaluate_policy, real_images
from learner.fleet_plan import sampling_plan
from rewards.config import NETWORKS
from tests.distributed.failures.kills import pid_of
from tests.small_run import small_config
from tests.unit.helpers import request

REQUESTS = [request(group, 8, panel="judge") for group in range(10)]


def kill_one(pool: WorkerPool) -> None:
    """Kill one that has work."""
    serving = pool.of(State.SERVING)
    victim = next((worker for worker in serving if not worker.idle), serving[0])
    os.kill(pid_of(victim), signal.SIGKILL)


def same_scores(ours: GroupScores, theirs: GroupScores) -> None:
    assert ours.key == theirs.key
    for name, values in {**theirs.scores, **theirs.features}.items():
        np.testing.assert_array_equal({**ours.scores, **ours.features}[name], values, err_msg=name)


def test_neither_the_number_of_samplers_nor_deaths_change_a_bit(ray_session: RaySession) -> None:
    alone = small_config(num_samplers=1)
    with InlineFleet(sampling_plan(alone)) as inline:
        expected, images = list(inline.stream(REQUESTS)), inline.sample_images(REQUESTS)

    with RayFleet(sampling_plan(small_config(num_samplers=2)), ray_session) as fleet:
        samplers, servers = fleet.pools
        assert {worker.role.name for worker in fleet._all()} == {"sampler", "reward-server"}
        with pytest.raises(FleetError, match="this fleet has no learner: it was started to"):
            _ = fleet.learner

        found, scored = [], []
        given = fleet.score_images(zip(REQUESTS, images, strict=True))
        for group, scores in zip(fleet.stream(REQUESTS), given, strict=True):
            found.append(group)
            scored.append(scores)
            if len(found) == 2:
                kill_one(samplers)
                kill_one(servers)
        assert fleet.restarts == 2

    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.rollouts.tokens, theirs.rollouts.tokens)
        np.testing.assert_array_equal(ours.rollouts.logprobs, theirs.rollouts.logprobs)
        assert ours.rollouts.version == 0
        same_scores(ours.scores, theirs.scores)
    for scores, theirs in zip(scored, expected, strict=True):
        same_scores(scores, theirs.scores)


def test_a_judge_of_images_of_several_sizes(ray_session: RaySession, tmp_path: Path) -> None:
    """Real images from a folder, and a policy's figures against them, as with everything in one
    process."""
    generator = np.random.default_rng(0)
    for number in range(12):
        pixels = generator.integers(0, 256, (8 + number % 3, 10, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02}.png")
    space = {"network": "clip", "model": f"{NETWORKS}/judge_clip", "checkpoint": ""}
    config = small_config(
        num_samplers=2,
        num_reward_servers=2,
        judge={"features": space, "second": {**space, "model": f"{NETWORKS}/clip"}},
        evaluation={"images": str(tmp_path), "num_images": 20, "neighbours": 2},
    )

    def figures(fleet: InlineFleet | RayFleet) -> dict[str, float]:
        real = real_images(config, fleet)
        assert {space: len(rows) for space, rows in real.features.items()} == {
            "features": 12,
            "second": 12,
        }
        return evaluate_policy(config, fleet, config.sampling, real)

    with InlineFleet(sampling_plan(config)) as inline:
        expected = figures(inline)
    with RayFleet(sampling_plan(config), ray_session) as fleet:
        assert figures(fleet) == expected
    assert expected["images"] == 20
