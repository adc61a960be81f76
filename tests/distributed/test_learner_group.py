"""Two learners on real Ray learn what one learns, behind the same surface."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import ray

from cluster.errors import ConfigError, FleetError, TesseraError
from cluster.fleet import InlineFleet
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.private import call_inside
from cluster.ray_session.session import RaySession
from cluster.roles import FleetPlan
from cluster.weights import unpack_weights
from learner.checkpoints.exchange import fetch, send
from learner.config import RunConfig
from learner.fleet_plan import fleet_plan
from learner.loop import Iteration
from learner.training.batch import TrainingBatch, make_batch
from tests.distributed.stubs import echo_plan, learners_alone
from tests.small_run import run_training, small_config

ROUNDING = 1e-6
"""Largest difference of a weight after the whole run; sums are taken in another order."""


def config_of(**changes: object) -> RunConfig:
    return small_config(learner={"lr": 1e-5, "microbatch": 4}, **changes)


@pytest.fixture(scope="module")
def alone() -> tuple[list[Iteration], dict[str, np.ndarray]]:
    config = config_of()
    with InlineFleet(fleet_plan(config)) as fleet:
        return run_training(config, fleet), published(fleet)


def published(fleet) -> dict[str, np.ndarray]:
    state = unpack_weights(fleet.learner.snapshot())
    return {name: tensor.numpy() for name, tensor in state.items()}


def assert_equal(found: dict, expected: dict, bound: float = ROUNDING) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert np.abs(found[name] - weight).max() <= bound, name


class Together(InlineFleet):
    """Learners on Ray, everything else in this process."""

    def __init__(self, plan: FleetPlan, learners: RayFleet) -> None:
        super().__init__(plan)
        self._learner = learners.learner


def test_two_learners_of_eight_are_one_of_sixteen(
    ray_session: RaySession, alone: tuple, tmp_path: Path
) -> None:
    iterations, weights = alone
    config = config_of(num_learners=2)
    with RayFleet(learners_alone(fleet_plan(config)), ray_session) as learners:
        fleet = Together(fleet_plan(config_of()), learners)
        found = run_training(config, fleet)
        assert_equal(published(fleet), weights)
        fleet.learner.save(tmp_path)
        assert fleet.learner.restore(tmp_path) == 4
        assert_equal(published(fleet), weights)
        assert_goes_through_calls(fleet, tmp_path)
        assert_equal(published(fleet), weights)
        workers = {span.worker for span in found[0].spans if span.phase == "learn"}
        assert workers == {"learner-0", "learner-1"}
        batch = make_batch(4, found[-1].groups, found[-1].advantages)
        assert_ends_the_step_and_is_named(learners, batch)
    for ours, theirs in zip(found, iterations):
        for name in ("loss/grad_norm", "policy/entropy", "policy/ratio", "version"):
            assert ours.metrics[name] == pytest.approx(theirs.metrics[name], rel=1e-4), name
    # Complete, and independent of who wrote it: one learner goes on from it.
    with InlineFleet(fleet_plan(config_of())) as one:
        assert one.learner.restore(tmp_path) == 4
        assert_equal(published(one), weights)


def assert_goes_through_calls(fleet: InlineFleet, saved: Path) -> None:
    """What is saved, and restored, where the learners do not see a directory of the driver."""
    files, copies = sorted(saved.iterdir()), saved.with_name("copies")
    copies.mkdir()
    fleet.learner.save(None)
    fetch(fleet.learner, copies)
    assert [file.name for file in sorted(copies.iterdir())] == [file.name for file in files]
    assert all((copies / file.name).read_bytes() == file.read_bytes() for file in files)
    send(fleet.learner, files)
    assert fleet.learner.restore(None) == 4
    fleet.learner.drop_files()


def assert_ends_the_step_and_is_named(fleet: RayFleet, batch: TrainingBatch) -> None:
    """A lost learner does: not after the whole timeout, while the others wait for it in vain."""
    victim = fleet._stateful.learners[1].handle
    os.kill(ray.get(call_inside(victim, lambda _: os.getpid())), signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):  # from now on its loss is known
        ray.get(call_inside(victim, lambda _: os.getpid()))
    started = time.monotonic()
    with pytest.raises(FleetError, match="learner-1 was lost"):
        fleet.learner.step(batch)
    assert time.monotonic() - started < 60


@pytest.mark.slow  # the test above has the numbers; two learners that publish on Ray: only here
def test_two_learners_beside_samplers_and_servers(ray_session: RaySession, alone: tuple) -> None:
    config = config_of(num_learners=2, weights={"transport": "collective"})
    with RayFleet(fleet_plan(config), ray_session) as fleet:
        run_training(config, fleet)
        assert_equal(published(fleet), alone[1])
        assert fleet._weights._number
        assert fleet._weights._failures == 0


def test_in_one_process_there_is_one_learner() -> None:
    plan = fleet_plan(config_of(num_learners=2))
    with pytest.raises(ConfigError, match="2 learners compute in processes of their own"):
        InlineFleet(plan)


def test_a_learner_that_cannot_start_says_why(ray_session: RaySession) -> None:
    plan = echo_plan()
    learners = dataclasses.replace(plan.learner, config="cannot start", count=2)
    with (
        pytest.raises(TesseraError, match=r"^learner-0 could not start: [^\n]*no such weights$"),
        RayFleet(dataclasses.replace(plan, learner=learners), ray_session),
    ):
        pass
