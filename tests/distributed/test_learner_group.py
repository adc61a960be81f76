"""Two learners on real Ray learn what one learns, behind the same surface."""

from __future__ import annotations

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
from cluster.weights import unpack_weights
from learner.config import RunConfig
from learner.fleet_plan import fleet_plan
from learner.loop import Iteration
from tests.distributed.stubs import learners_alone
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


def test_two_learners_of_eight_are_one_of_sixteen(
    ray_session: RaySession, alone: tuple, tmp_path: Path
) -> None:
    iterations, weights = alone
    config = config_of(num_learners=2)
    with RayFleet(fleet_plan(config), ray_session) as fleet:
        found = run_training(config, fleet)
        assert_equal(published(fleet), weights)
        fleet.learner.save(tmp_path)
        assert fleet.learner.restore(tmp_path) == 4
        assert_equal(published(fleet), weights)
        workers = {span.worker for span in found[0].spans if span.phase == "learn"}
    assert workers == {"learner-0", "learner-1"}
    for ours, theirs in zip(found, iterations):
        for name in ("loss/grad_norm", "policy/entropy", "policy/ratio", "version"):
            assert ours.metrics[name] == pytest.approx(theirs.metrics[name], rel=1e-4), name
    # Complete, and independent of who wrote it: one learner goes on from it.
    with InlineFleet(fleet_plan(config_of())) as one:
        assert one.learner.restore(tmp_path) == 4
        assert_equal(published(one), weights)


def test_a_lost_learner_ends_the_step_and_is_named(ray_session: RaySession) -> None:
    """Not after the whole timeout: the others would wait for it in vain."""
    plan = learners_alone(fleet_plan(config_of(num_learners=2)))
    with RayFleet(plan, ray_session) as fleet:
        victim = fleet._stateful.learners[1].handle
        pid = ray.get(call_inside(victim, lambda _: os.getpid()))
        os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(FleetError, match="learner-1 was lost"):
            fleet.learner.start(2.0)
        assert time.monotonic() - started < 60


def test_in_one_process_there_is_one_learner() -> None:
    plan = fleet_plan(config_of(num_learners=2))
    with pytest.raises(ConfigError, match="2 learners compute in processes of their own"):
        InlineFleet(plan)


def test_a_step_that_fails_in_one_learner_fails_as_a_whole(ray_session: RaySession) -> None:
    config = config_of(num_learners=2, policy={"checkpoint": "nowhere.safetensors"})
    with (
        pytest.raises(TesseraError, match=r"^learner-0 could not start: [^\n]*no such file[^\n]*$"),
        RayFleet(learners_alone(fleet_plan(config)), ray_session),
    ):
        pass
