"""Sampling ahead of learning on Ray: the inline run's numbers, whoever dies or is slow."""

from __future__ import annotations

import time

import numpy as np
import pytest
import ray

from cluster.fleet import InlineFleet
from cluster.messages import RolloutGroup, SampleRequest
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.session import RaySession
from cluster.roles import FleetPlan, Resources, Role
from cluster.spans import Span
from learner.fleet_plan import fleet_plan
from tests.distributed.kills import kill_when_asked_for
from tests.distributed.test_ray_fleet import requests
from tests.small_run import fingerprint, run_training, small_config
from tests.stand_ins import drawn


def ahead(**changes: object):
    return small_config(max_staleness=1, iterations=5, **changes)


@pytest.fixture(scope="module")
def inline() -> list[tuple]:
    with InlineFleet(fleet_plan(ahead())) as fleet:
        return fingerprint(run_training(ahead(), fleet))


def test_one_ahead_equals_inline_bit_for_bit(ray_session: RaySession, inline: list[tuple]) -> None:
    config = ahead(num_samplers=3, num_reward_servers=2)
    with RayFleet(fleet_plan(config), ray_session) as fleet:
        assert fingerprint(run_training(config, fleet)) == inline


def test_a_killed_sampler_changes_nothing(ray_session: RaySession, inline: list[tuple]) -> None:
    """Its groups of the older version are drawn by one that starts with the older weights."""
    config = ahead(num_samplers=2)
    with RayFleet(fleet_plan(config), ray_session) as fleet:
        killed = kill_when_asked_for(fleet, fleet.pools[0].workers, iteration=2)
        assert fingerprint(run_training(config, fleet)) == inline
        assert (len(killed), fleet.restarts) == (1, 1)


class Slow:
    """Every role; `config` is the seconds that a group takes on the worker of each index."""

    def __init__(self, config: tuple[float, ...], name: str) -> None:
        index = name.rpartition("-")[2]
        self._seconds, self._version = config[int(index) if index.isdigit() else 0], 0

    def load_weights(self, snapshot: int) -> int:
        self._version = snapshot
        return snapshot

    def snapshot(self) -> int:
        self._version += 1
        return self._version

    def step(self, seconds: float) -> float:
        time.sleep(seconds)
        return time.time()

    def sample(self, requests: list[SampleRequest]) -> list[RolloutGroup]:
        (request,) = requests
        time.sleep(self._seconds)
        return [drawn(request, self._version)]

    def images(self, group: RolloutGroup) -> tuple[np.ndarray, Span]:
        return np.full((1, 1), group.version), Span("sampler", "decode", 0.0, 0.0)


def slow_plan(*seconds: float) -> FleetPlan:
    def role(name: str, config: tuple[float, ...] = (0.0,), count: int = 1) -> Role:
        resources = Resources(num_cpus=0.1)
        return Role(name=name, factory=Slow, config=config, resources=resources, count=count)

    return FleetPlan(
        sampler=role("sampler", seconds, len(seconds)),
        reward_server=Role(
            name="server", factory=Slow, config=(0.0,), resources=Resources(num_cpus=0.1)
        ),
        moments_server=Role(
            name="moments", factory=Slow, config=(0.0,), resources=Resources(num_cpus=0.1)
        ),
        learner=Role(
            name="learner", factory=Slow, config=(0.0,), resources=Resources(num_cpus=0.1)
        ),
        timeout_s=60,
    )


def versions(fleet: RayFleet, count: int) -> list[int]:
    return [int(images[0, 0]) for images in fleet.sample_images(requests(count))]


def test_groups_have_the_weights_of_when_they_were_asked_for(ray_session: RaySession) -> None:
    with RayFleet(slow_plan(0.0, 0.3), ray_session) as fleet:
        fleet.broadcast()
        first = fleet._submit(requests(8), scored=False)
        fleet.broadcast()  # while most of those wait
        second = fleet._submit(requests(4), scored=False)
        fleet.broadcast()
        assert [int(images[0, 0]) for images in fleet._collect(second)] == [2] * 4
        assert [int(images[0, 0]) for images in fleet._collect(first)] == [1] * 8
        assert versions(fleet, 2) == [3, 3]
        assert len(fleet._delivery._editions) == 1


def test_nobody_waits_for_a_straggler(ray_session: RaySession) -> None:
    """A broadcast returns at once, and the fast sampler goes on with new weights meanwhile."""
    with RayFleet(slow_plan(0.01, 3.0), ray_session) as fleet:
        fleet.broadcast()
        assert versions(fleet, 2) == [1, 1]
        slow = fleet._submit(requests(4), scored=False)  # two of them with each, at first
        start = time.monotonic()
        fleet.broadcast()
        fast = fleet._submit(requests(2), scored=False)
        assert time.monotonic() - start < 1.0
        assert [int(images[0, 0]) for images in fleet._collect(fast)] == [2, 2]
        assert time.monotonic() - start < 3.0
        assert [int(images[0, 0]) for images in fleet._collect(slow)] == [1] * 4
        assert time.monotonic() - start > 3.0


def test_groups_move_on_while_the_learner_learns(ray_session: RaySession) -> None:
    with RayFleet(slow_plan(0.2), ray_session) as fleet:
        fleet.broadcast()
        ticket = fleet._submit(requests(6), scored=False)  # three times what a worker has in hand
        fleet.learner.step(2.5)
        assert not fleet._answers[ticket].missing


def test_older_work_of_one_that_was_to_leave_is_done_all_the_same(
    ray_session: RaySession,
) -> None:
    """The one worker that could do it is gone and gets no successor; another is turned back."""
    with RayFleet(slow_plan(0.0, 1.5), ray_session) as fleet:
        fleet.broadcast()
        assert versions(fleet, 2) == [1, 1]
        old = fleet._submit(requests(4), scored=False)
        fleet.broadcast()
        samplers = fleet.pools[0]
        leaving = samplers.workers[1]
        samplers.scale(1)
        while fleet._calls and any(call.worker is not leaving for call in fleet._calls.values()):
            fleet._turn()
        assert samplers.workers[0].edition == 2
        ray.kill(leaving.handle)
        assert [int(images[0, 0]) for images in fleet._collect(old)] == [1] * 4
        assert versions(fleet, 1) == [2]
        assert fleet.restarts == 0
