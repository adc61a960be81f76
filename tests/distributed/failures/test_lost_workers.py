"""Whoever dies, and whenever: the run ends as if nobody had, within bounded time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.fleet import Fleet, InlineFleet
from cluster.io.run_layout import step_name
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.session import RaySession
from cluster.scheduling.pool import Worker
from learner.config import RunConfig
from learner.experiment import Experiment
from learner.fleet_plan import fleet_plan
from learner.monitoring.console import RunConsole
from learner.runs.run_dir import RunDirectory
from tests.distributed.failures import failing
from tests.distributed.failures.kills import once, pid_of, when_asked_for
from tests.small_run import recorded, small_config

BOUND_S = 400.0
"""From the start of training to its end, on two cores that other tests keep busy; they alone take
a quarter of it."""
SILENCE_S = 20.0  # a live worker that other tests starve is not taken for a silent one
OPTIONS: dict[str, Any] = {
    "num_samplers": 2,
    "num_reward_servers": 2,
    "evaluation": {"num_images": 0},
    "output": {"gallery_every": 0, "checkpoint_every": failing.EVERY, "keep_checkpoints": 99},
    "heartbeat_s": SILENCE_S,
    "max_restarts": 20,
}


def run_whole(config: RunConfig, fleet: Fleet, path: Path) -> list[tuple]:
    """A run as `learner.run` makes it, on a fleet that is there; what it has recorded."""
    run = RunDirectory.create(str(path), config)
    with RunConsole(config.iterations) as console:
        start = time.monotonic()
        assert Experiment(config, run, fleet, console, lambda: False).run()
        assert time.monotonic() - start < BOUND_S
    return recorded(run.path)


def kill_all(workers: Sequence[Worker]) -> None:
    pids = [pid_of(worker) for worker in workers]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def with_scorer(folder: Path, iterations: int, servers: int) -> RunConfig:
    extra = f"tests.distributed.failures.failing:Scorer=0.3,folder={folder},name=bright"
    further = {"pixels": {"features": {"network": "pixels"}, "seed_images": 40}}
    rewards = {"extra": [extra], "further": further}
    options = {**OPTIONS, "num_reward_servers": servers, "rewards": rewards}
    return small_config(**options, iterations=iterations)


EACH_ROLE = (
    "moments-killed",
    "server-killed",
    "learner-step",
    "learner-save",
    "sampler-stopped",
)
IDLE, ALL_SAMPLERS, ALL_SERVERS = 6, 8, 10
"""Iterations before or after whose requests workers are killed from outside: not while a learner
is replaced, when samplers that start are replaced as well, which counts as no loss of theirs; and
not in an iteration in which a reason of `failing` takes one of the same role."""


@pytest.mark.parametrize(
    ("reasons", "iterations", "num_servers"),
    [(EACH_ROLE, 10, 1), pytest.param(failing.REASONS, 12, 2, marks=pytest.mark.slow)],
    ids=["each role", "for every reason"],
)
def test_every_role_is_lost_in_turn_and_the_run_ends_as_if_none_had_been(
    ray_session: RaySession,
    tmp_path: Path,
    reasons: Sequence[str],
    iterations: int,
    num_servers: int,
) -> None:
    """Killed and stopped in the middle of its work, while it saves, all samplers at once; in the
    long variant also idle, while it starts, and all reward servers."""
    every = len(reasons) == len(failing.REASONS)
    folder, calm = tmp_path / "failed", tmp_path / "calm"
    failing.spare(folder, reasons)
    failing.spare(calm, ())
    config = with_scorer(calm, iterations, num_servers)
    with InlineFleet(fleet_plan(config)) as inline:
        expected = run_whole(config, inline, tmp_path / "unharmed")

    config = with_scorer(folder, iterations, num_servers)
    with RayFleet(failing.failing(fleet_plan(config), folder), ray_session) as fleet:
        samplers, servers = fleet.pools
        killed: list[Worker] = []

        def killing(victims: Callable[[], Sequence[Worker]]) -> Callable[[], None]:
            def inject() -> None:
                found = list(victims())
                kill_all(found)
                killed.extend(found)

            return once(inject)

        when_asked_for(fleet, ALL_SAMPLERS, killing(lambda: samplers.workers))
        if every:
            when_asked_for(fleet, IDLE, killing(lambda: samplers.workers[:1]), after=False)
            when_asked_for(fleet, ALL_SERVERS, killing(lambda: servers.workers))
        assert run_whole(config, fleet, tmp_path / "run") == expected
        assert len(killed) == (5 if every else 2)
        assert fleet.restarts == len(reasons) + len(killed)
    assert {path.name for path in folder.iterdir()} == {*failing.REASONS}
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    steps = range(failing.EVERY, iterations + 1, failing.EVERY)
    assert kept == [step_name(step) for step in steps]


@pytest.mark.slow
def test_one_of_two_learners_dies_in_mid_step(ray_session: RaySession, tmp_path: Path) -> None:
    options = {**OPTIONS, "num_reward_servers": 1, "iterations": 6}
    config = small_config(**options, num_learners=2)
    found = []
    for name, reasons in (("unharmed", ()), ("failed", ("learner-step",))):
        failing.spare(tmp_path / name, reasons)
        plan = failing.failing(fleet_plan(config), tmp_path / name)
        with RayFleet(plan, ray_session) as fleet:
            found.append(run_whole(config, fleet, tmp_path / f"run-{name}"))
            assert fleet.restarts == len(reasons)
    assert found[0] == found[1]
