"""Sampling ahead of learning on Ray: the inline run's numbers, with killed and slow workers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import ray

from cluster.fleet import InlineFleet
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.session import RaySession
from learner.fleet_plan import fleet_plan
from tests.distributed.failures.kills import kill_when_asked_for
from tests.distributed.stubs import Held, requests, slow_plan
from tests.small_run import fingerprint, run_training, small_config


def ahead(**changes: object):
    return small_config(max_staleness=1, **changes)


FULL = pytest.param(0, marks=pytest.mark.slow)  # test_ray_fleet.py, one ahead: nobody dies there


@pytest.mark.parametrize("rank", [2, FULL])
def test_one_ahead_equals_inline_bit_for_bit_when_workers_die(
    ray_session: RaySession, rank: int
) -> None:
    """The killed sampler's groups of the older version are drawn by one that starts with the older
    weights: with `rank`, the frozen ones and the older adapters, else all."""
    config = ahead(num_samplers=2, learner={"lora": {"rank": rank}})
    assert fleet_plan(config).adapters_alone == bool(rank)
    with InlineFleet(fleet_plan(config)) as inline:
        expected = fingerprint(run_training(config, inline))
    with RayFleet(fleet_plan(config), ray_session) as fleet:
        killed = kill_when_asked_for(fleet, fleet.pools[0].workers, iteration=2)
        done = run_training(config, fleet)
        assert (len(killed), fleet.restarts) == (1, 1)
    assert fingerprint(done) == expected
    for number, iteration in enumerate(done):
        assert {g.rollouts.version for g in iteration.groups} == {max(number - 1, 0)}


def versions(fleet: RayFleet, count: int) -> list[int]:
    return [int(images[0, 0]) for images in fleet.sample_images(requests(count))]


def test_groups_have_the_weights_of_when_they_were_asked_for(ray_session: RaySession) -> None:
    with RayFleet(slow_plan(0.0, 0.3), ray_session) as fleet:
        fleet.broadcast(1)
        first = fleet._submit(requests(8), scored=False)
        fleet.broadcast(2)  # while most of those wait
        second = fleet._submit(requests(4), scored=False)
        fleet.broadcast(3)
        assert [int(images[0, 0]) for images in fleet._collect(second)] == [2] * 4
        assert [int(images[0, 0]) for images in fleet._collect(first)] == [1] * 8
        assert versions(fleet, 2) == [3, 3]
        assert len(fleet._broadcaster._weight_versions) == 1


def test_nobody_waits_for_a_straggler(ray_session: RaySession, tmp_path: Path) -> None:
    """A broadcast returns at once, and the fast sampler goes on with new weights meanwhile."""
    hold = tmp_path / "hold"
    plan = slow_plan(0.0, 0.0)
    sampler = dataclasses.replace(plan.sampler, factory=Held, config=str(hold))
    with RayFleet(dataclasses.replace(plan, sampler=sampler), ray_session) as fleet:
        fleet.broadcast(1)
        assert versions(fleet, 2) == [1, 1]
        hold.touch()  # from now on, the second sampler stands still
        slow = fleet._submit(requests(4), scored=False)  # two of them with each, at first
        fleet.broadcast(2)
        fast = fleet._submit(requests(2), scored=False)
        assert [int(images[0, 0]) for images in fleet._collect(fast)] == [2, 2]
        assert slow.missing
        hold.unlink()
        assert [int(images[0, 0]) for images in fleet._collect(slow)] == [1] * 4


def test_groups_move_on_while_the_learner_learns(ray_session: RaySession, tmp_path: Path) -> None:
    with RayFleet(slow_plan(0.05), ray_session) as fleet:
        fleet.broadcast(1)
        batch = fleet._submit(requests(6), scored=False)  # three times what a worker has in hand
        done, advance = tmp_path / "done", fleet._group_calls.advance

        def listen(ref: ray.ObjectRef) -> None:
            advance(ref)
            if not batch.missing:
                done.touch()

        fleet._group_calls.advance = listen
        assert fleet.learner.step_until(str(done))


def test_older_work_of_one_that_was_to_leave_is_done_all_the_same(
    ray_session: RaySession,
) -> None:
    """The one worker that could do it is gone and gets no successor; another is turned back."""
    with RayFleet(slow_plan(0.0, 1.5), ray_session) as fleet:
        fleet.broadcast(1)
        assert versions(fleet, 2) == [1, 1]
        old = fleet._submit(requests(4), scored=False)
        fleet.broadcast(2)
        samplers = fleet.pools[0]
        leaving = samplers.workers[1]
        samplers.scale(1)
        while fleet._calls and any(call.worker is not leaving for call in fleet._calls.values()):
            fleet._poll()
        assert samplers.workers[0].weight_version == 2
        ray.kill(leaving.handle)
        assert [int(images[0, 0]) for images in fleet._collect(old)] == [1] * 4
        assert versions(fleet, 1) == [2]
        assert fleet.restarts == 0
