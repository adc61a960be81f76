"""Weights on their way through a real object store: who may die, and what nobody may touch."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from cluster.errors import InputLostError, LearnerLostError
from cluster.ray_backend import heartbeat, publisher
from cluster.ray_backend.collective import PART_S
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_backend.publisher import Published, Publisher, publisher_of
from cluster.ray_backend.relays import relay
from cluster.ray_backend.transports import COLLECTIVE, OBJECT_STORE
from cluster.ray_session.calls import answer
from cluster.ray_session.private import actor_id
from cluster.ray_session.session import RaySession
from cluster.snapshots.pieces import BLOCK
from tests.distributed.stubs import requests
from tests.distributed.weight_stubs import Mortal, SmallLearner, SmallSampler, small_plan

WAIT_S = 120.0


@contextmanager
def actors(publisher: Publisher, *kinds: type) -> Iterator[list[Any]]:
    threads = {heartbeat.GROUP: 1}
    handles = [publisher.actor_class(k, threads).options(num_cpus=0.1).remote() for k in kinds]
    try:
        yield handles
    finally:
        for handle in handles:
            ray.kill(handle)


def loaded(publisher: Publisher, weights: Published, *samplers: Any) -> list[int]:
    refs = [publisher.load(sampler, weights) for sampler in samplers]
    return [answer(ref, "load", WAIT_S) for ref in refs]


def values(sampler: Any) -> list[float]:
    return answer(sampler.values.remote(), "values", WAIT_S)


def test_a_snapshot_outlives_the_learner_and_in_place_writes(ray_session: RaySession) -> None:
    publisher = Publisher(OBJECT_STORE)
    with actors(publisher, SmallLearner, *[SmallSampler] * 3) as (learner, writer, other, late):
        weights = publisher.publish([learner])
        assert loaded(publisher, weights, writer, other) == [1, 1]
        answer(writer.write_in_place.remote(), "write", WAIT_S)
        assert values(writer) == [2.0]
        assert values(other) == [1.0]
        os.kill(answer(learner.pid.remote(), "pid", WAIT_S), signal.SIGKILL)
        with pytest.raises(ray.exceptions.RayActorError):
            answer(learner.pid.remote(), "pid", WAIT_S)
        assert loaded(publisher, weights, late) == [1]  # checks the sums of the shared copy again
        assert values(late) == [1.0]


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every actor counts as on a node of its own, and the smallest snapshots travel in pieces."""
    monkeypatch.setattr(relay, "PIECE", BLOCK)
    monkeypatch.setattr(
        publisher.backend, "nodes_of", lambda handles: [actor_id(each) for each in handles]
    )


def test_weights_are_passed_on_and_outlive_who_did(ray_session: RaySession, nodes: None) -> None:
    """The learner is killed when it has sent them, and who passed them on after that."""
    publisher = Publisher(OBJECT_STORE)
    with actors(publisher, SmallLearner, *[SmallSampler] * 4) as (learner, *samplers):
        for version in (1, 2, 3):
            weights = publisher.publish([learner], samplers)
            assert len(weights.copies) == 4
            assert len({refs[0] for refs in weights.copies.values()}) == 3
            assert loaded(publisher, weights, *samplers) == [version] * 4
            assert [values(sampler) for sampler in samplers] == [[version]] * 4
        assert {kind for sampler in samplers for kind in came(sampler)} == {"Pieces"}
        passing = {actor_id(each): each for each in samplers}[[*weights.copies][1]]
        for lost in (learner, passing):
            os.kill(answer(lost.pid.remote(), "pid", WAIT_S), signal.SIGKILL)
        left = [sampler for sampler in samplers if sampler is not passing]
        assert loaded(publisher, weights, *left) == [3] * 3


def test_who_passes_weights_on_and_is_lost_is_passed_by(
    ray_session: RaySession, nodes: None
) -> None:
    publisher = Publisher(OBJECT_STORE)
    with actors(publisher, SmallLearner, *[SmallSampler] * 3) as (learner, *samplers):
        first = publisher.publish([learner], samplers)
        assert loaded(publisher, first, *samplers) == [1] * 3
        passing = {actor_id(each): each for each in samplers}[next(iter(first.copies))]
        os.kill(answer(passing.pid.remote(), "pid", WAIT_S), signal.SIGKILL)
        weights = publisher.publish([learner], samplers)  # nobody has noticed yet
        left = [sampler for sampler in samplers if sampler is not passing]
        began = time.monotonic()
        assert loaded(publisher, weights, *left) == [2] * 2
        assert time.monotonic() - began < relay.LATE_S
        assert [values(sampler) for sampler in left] == [[2.0]] * 2


def test_a_learner_that_is_lost_while_it_packs_is_named(
    ray_session: RaySession, nodes: None
) -> None:
    publisher = Publisher(OBJECT_STORE)
    with actors(publisher, SmallLearner, *[SmallSampler] * 2) as (learner, *samplers):
        os.kill(answer(learner.pid.remote(), "pid", WAIT_S), signal.SIGKILL)
        weights = publisher.publish([learner], samplers)
        for sampler in samplers:
            with pytest.raises(InputLostError):
                loaded(publisher, weights, sampler)


def test_a_sampler_that_dies_in_its_load_harms_nobody(
    ray_session: RaySession, tmp_path: Path
) -> None:
    with RayFleet(small_plan(tmp_path), ray_session) as fleet:
        fleet.broadcast(1)
        images = fleet.sample_images(requests(6))
        assert (tmp_path / "died").exists()
        assert [image.tolist() for image in images] == [[1.0]] * 6
        assert fleet.restarts == 1
        fleet.broadcast(2)
        images = fleet.sample_images(requests(6))
        assert [image.tolist() for image in images] == [[2.0]] * 6


def came(sampler: Any) -> list[str]:
    return answer(sampler.came.remote(), "came", WAIT_S)


def settled(publisher: Publisher) -> None:
    """Until all members have answered for the last broadcast."""
    deadline = time.monotonic() + WAIT_S
    while publisher._pending and time.monotonic() < deadline:
        publisher.look()
        time.sleep(0.05)
    assert not publisher._pending


def test_a_broadcast_group_follows_its_members(ray_session: RaySession, logged: list[str]) -> None:
    """Rebuilt when one joins, or dies in the middle of a broadcast: the others then take the same
    weights from the object store."""
    publisher = Publisher(COLLECTIVE, timeout_s=WAIT_S)
    kinds = [SmallLearner, SmallSampler, SmallSampler, Mortal]
    with actors(publisher, *kinds) as (learner, first, second, mortal):

        def broadcast(members: list[Any], receivers: list[Any]) -> None:
            weights = publisher.publish([learner], members)
            assert loaded(publisher, weights, *receivers) == [publisher._number] * len(receivers)

        broadcast([first], [first, second])  # the second came too late for this one
        broadcast([first, mortal], [first, mortal])
        settled(publisher)
        assert not [line for line in logged if "failed" in line]
        began = time.monotonic()
        broadcast_refs = publisher.publish([learner], [first, mortal])
        refs = [publisher.load(sampler, broadcast_refs) for sampler in (first, mortal)]
        settled(publisher)
        assert answer(refs[0], "load", WAIT_S) == 3
        assert time.monotonic() - began < PART_S  # nobody waits for a timeout
        with pytest.raises(ray.exceptions.RayActorError):
            answer(refs[1], "load", WAIT_S)
        assert values(first) == [3.0]
        broadcast([first, second], [first, second])
        settled(publisher)
        assert values(first) == values(second) == [4.0]
        assert came(first) == ["Tensor", "Tensor", came(first)[2], "Tensor"]
        assert came(second) == ["ndarray", "Tensor"]
        for pid in (answer(actor.pid.remote(), "pid", WAIT_S) for actor in (learner, first)):
            sockets = psutil.Process(pid).net_connections()
            listen = {each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN}
            assert {ip.removeprefix("::ffff:") for ip in listen} == {"127.0.0.1"}
    groups = [line for line in logged if line.startswith("weights: a broadcast group of")]
    (failed,) = (line for line in logged if line not in groups)
    assert len(groups) == 3
    assert failed.startswith("weights: broadcast 3 failed (")
    assert failed.endswith("object store, and the next one forms a new group")


def test_a_fleet_that_broadcasts_draws_the_same(
    ray_session: RaySession, tmp_path: Path, logged: list[str]
) -> None:
    """A sampler dies in the middle of a broadcast; and at last the learner's weights are lost."""
    plan = small_plan(tmp_path)
    sampler = dataclasses.replace(plan.sampler, factory=Mortal, config="")
    plan = dataclasses.replace(plan, sampler=sampler, transport=COLLECTIVE, max_restarts=3)
    with RayFleet(plan, ray_session) as fleet:
        drawn = []
        for version in range(1, 4):
            fleet.broadcast(version)
            drawn += [image.tolist() for image in fleet.sample_images(requests(4))]
        assert drawn == [[float(version)] for version in range(1, 4) for _ in range(4)]
        assert fleet.restarts >= 1
        (learner,) = fleet._stateful.learners
        os.kill(answer(learner.handle.pid.remote(), "pid", WAIT_S), signal.SIGKILL)
        fleet.broadcast(4)
        with pytest.raises(LearnerLostError):
            fleet.sample_images(requests(4))
    assert any(line.startswith("weights: broadcast 2 failed") for line in logged)


def test_a_transport_that_is_of_no_use_is_replaced_and_said(
    ray_session: RaySession, logged: list[str]
) -> None:
    plan = dataclasses.replace(small_plan(Path()), transport="nccl", adapters_alone=True)
    assert not publisher_of(plan)._collective
    assert logged == [
        "weights.transport nccl is called collective now",
        "weights.transport collective cannot run, going on with object-store: adapters travel "
        "alone, and are too small for it to matter",
    ]
