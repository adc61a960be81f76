"""Weights on their way through a real object store: who may die, and what nobody may touch."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.errors import CheckpointError
from cluster.ray_backend import fleet as ray_fleet
from cluster.ray_backend import publisher as publishing
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_backend.publisher import Published, Publisher
from cluster.ray_backend.transports import OBJECT_STORE
from cluster.ray_session.calls import answer
from cluster.ray_session.session import RaySession
from learner.fleet_plan import fleet_plan
from tests.distributed.stubs import requests
from tests.distributed.weight_stubs import Picky, SmallLearner, SmallSampler, small_plan
from tests.small_run import small_config

WAIT_S = 120.0


@contextmanager
def actors(publisher: Publisher, *kinds: type) -> Iterator[list[Any]]:
    handles = [publisher.actor_class(k, {}).options(num_cpus=0.1).remote() for k in kinds]
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


def test_a_transport_that_cannot_run_is_replaced_and_said(
    ray_session: RaySession, logged: list[str]
) -> None:
    plan = fleet_plan(small_config(weights={"transport": "nccl"}))
    publishing.publisher_of(plan)
    assert logged == [
        "weights.transport nccl cannot run, going on with object-store: the learner must have a "
        "GPU (num_gpus is 0); samplers must have a GPU (num_gpus is 0)"
    ]


def test_a_group_transport_brings_the_weights_and_falls_back_once(
    ray_session: RaySession, logged: list[str]
) -> None:
    publisher = Publisher("gloo", timeout_s=WAIT_S)
    with actors(publisher, SmallLearner, *[SmallSampler] * 3) as (learner, first, second, late):
        for version in (1, 2):
            weights = publisher.publish([learner], [first, second])
            assert loaded(publisher, weights, first, second) == [version] * 2
            assert values(first) == values(second) == [float(version)]
        # Who came later, and the group cannot take in, is served by the object store. The stand-in
        # counts every snapshot as a version.
        assert loaded(publisher, weights, late) == [3]
        weights = publisher.publish([learner], [first, second, late])
        assert loaded(publisher, weights, first, second) == [4, 4]
        assert loaded(publisher, weights, late) == [5]
        assert not logged
        assert publisher.fall_back(CheckpointError("snapshot 4 is damaged"))
        assert not publisher.fall_back(CheckpointError("snapshot 4 is damaged"))
        assert len(logged) == 1
        assert loaded(publisher, publisher.publish([learner], [first]), first) == [6]


def test_a_fleet_over_a_group_transport(
    ray_session: RaySession, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    """It draws with the newest weights, and goes on when the transport fails."""
    publisher = Publisher("gloo", timeout_s=WAIT_S)
    monkeypatch.setattr(ray_fleet, "publisher_of", lambda *_: publisher)
    plan = small_plan(Path())
    sampler = dataclasses.replace(plan.sampler, factory=Picky, config="")
    with RayFleet(dataclasses.replace(plan, sampler=sampler), ray_session) as fleet:
        drawn = []
        for version in (1, 2):
            assert not logged
            fleet.broadcast(version)
            drawn += [image.tolist() for image in fleet.sample_images(requests(4))]
        assert fleet.restarts == 0
    assert logged == [
        "weights.transport gloo failed, going on with object-store: snapshot 2 is damaged"
    ]
    assert drawn == [[1.0]] * 4 + [[3.0]] * 4  # the stand-in's every snapshot is a version
