"""Whoever dies, and whenever: the run ends as if nobody had, within bounded time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.fleet import Fleet, InlineFleet
from cluster.io.run_layout import step_name
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.session import RaySession
from cluster.roles import FleetPlan
from cluster.scheduling.pool import Worker
from learner.config import RunConfig
from learner.experiment import Experiment
from learner.fleet_plan import fleet_plan
from learner.monitoring.console import RunConsole
from learner.runs.run_dir import RunDirectory
from tests.distributed import failing
from tests.distributed.kills import pid_of, when_asked_for
from tests.small_run import recorded, small_config

BOUND_S = 150.0
"""From the start of training to its end, on two busy cores; a quiet machine needs a tenth."""
SILENCE_S = 10.0
SLOW = pytest.mark.slow  # beyond the least that every change must show
OPTIONS: dict[str, Any] = {
    "num_samplers": 2,
    "num_reward_servers": 2,
    "evaluation": {"num_images": 0},
    "output": {"gallery_every": 0},
    "heartbeat_s": SILENCE_S,
}


def run_whole(config: RunConfig, fleet: Fleet, path: Path) -> list[tuple]:
    """A run as `learner.run` makes it, on a fleet that is there; what it has recorded."""
    run = RunDirectory.create(str(path), config)
    with RunConsole(config.iterations) as console:
        start = time.monotonic()
        assert Experiment(config, run, fleet, console, lambda: False).run()
        assert time.monotonic() - start < BOUND_S
    return recorded(run.path)


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    config = small_config(**OPTIONS)
    with InlineFleet(fleet_plan(config)) as fleet:
        return run_whole(config, fleet, tmp_path_factory.mktemp("unharmed") / "run")


def kill_all(workers: Sequence[Worker]) -> None:
    pids = [pid_of(worker) for worker in workers]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "victim",
    [
        "an idle sampler",
        "all samplers at once",
        pytest.param("all reward servers", marks=SLOW),
    ],
)
def test_workers_are_killed(
    ray_session: RaySession, unharmed: list[tuple], tmp_path: Path, victim: str
) -> None:
    config = small_config(**OPTIONS)
    with RayFleet(fleet_plan(config), ray_session) as fleet:
        samplers, servers = fleet.pools
        victims = {
            "an idle sampler": samplers.workers[:1],
            "all samplers at once": list(samplers.workers),
            "all reward servers": list(servers.workers),
        }[victim]
        strike, after = lambda: kill_all(victims), "all" in victim
        when_asked_for(fleet, failing.ITERATION, strike, after=after)
        assert run_whole(config, fleet, tmp_path / "run") == unharmed
        assert fleet.restarts == len(victims)


@pytest.mark.parametrize(
    ("role", "kind", "file"),
    [
        ("sampler", failing.BusySampler, "sampler-SIGKILL"),
        ("sampler", failing.StoppedSampler, "sampler-SIGSTOP"),
        ("moments", failing.CommitKilledMoments, "moments-commit"),
        pytest.param("moments", failing.StoppedMoments, "moments-stopped", marks=SLOW),
        pytest.param(
            "moments", failing.AnswerKilledMoments, "moments-answer", marks=pytest.mark.slow
        ),
        pytest.param(
            "learner", failing.StartKilledLearner, "learner-start", marks=pytest.mark.slow
        ),
        ("learner", failing.StepKilledLearner, "learner-step"),
        ("learner", failing.SaveKilledLearner, "learner-save"),
        ("learner", failing.FirstSaveKilledLearner, "learner-save"),
        pytest.param("learner", failing.StoppedLearner, "learner-stopped", marks=SLOW),
    ],
)
def test_roles_die_in_mid_work(
    ray_session: RaySession,
    unharmed: list[tuple],
    tmp_path: Path,
    role: str,
    kind: type,
    file: str,
) -> None:
    config = small_config(**OPTIONS)
    plan: FleetPlan = failing.with_role(fleet_plan(config), role, kind, tmp_path)
    with RayFleet(plan, ray_session) as fleet:
        assert run_whole(config, fleet, tmp_path / "run") == unharmed
        assert (tmp_path / file).exists()
        assert fleet.restarts == 1
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    steps = range(failing.EVERY, config.iterations + 1, failing.EVERY)
    assert kept == [step_name(step) for step in steps]


@pytest.mark.parametrize("end", ["SIGKILL", "SIGSTOP"])
def test_a_reward_server_dies_in_mid_batch(
    ray_session: RaySession, tmp_path: Path, end: str
) -> None:
    extra = f"tests.distributed.failing:Scorer=0.3,folder={tmp_path},end={end},name=bright"
    config = small_config(**OPTIONS, rewards={"extra": [extra]})
    file = tmp_path / f"server-{end}"
    file.touch()
    with InlineFleet(fleet_plan(config)) as inline:
        expected = run_whole(config, inline, tmp_path / "unharmed")
    file.unlink()
    with RayFleet(fleet_plan(config), ray_session) as fleet:
        assert run_whole(config, fleet, tmp_path / "run") == expected
        assert file.exists()
        assert fleet.restarts == 1


@pytest.mark.slow
def test_one_of_two_learners_dies_in_mid_step(ray_session: RaySession, tmp_path: Path) -> None:
    config = small_config(**{**OPTIONS, "num_reward_servers": 1}, num_learners=2)
    plan = failing.with_role(fleet_plan(config), "learner", failing.StepKilledLearner, tmp_path)
    file = tmp_path / "learner-step"
    file.touch()
    with RayFleet(plan, ray_session) as fleet:
        expected = run_whole(config, fleet, tmp_path / "unharmed")
    file.unlink()
    with RayFleet(plan, ray_session) as fleet:
        assert run_whole(config, fleet, tmp_path / "run") == expected
        assert file.exists()
        assert fleet.restarts == 1
