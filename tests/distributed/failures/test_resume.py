"""A run goes on with another number of samplers, reward servers and learners: same rollouts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cluster.fleet import Fleet, InlineFleet
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.session import RaySession
from learner.config import RunConfig
from learner.experiment import Experiment
from learner.fleet_plan import fleet_plan
from learner.monitoring.console import RunConsole
from learner.runs.run_dir import RunDirectory
from tests.small_run import recorded, small_config

QUICK = {"evaluation": {"num_images": 0}, "output": {"checkpoint_every": 2, "gallery_every": 0}}


def go_on(run: RunDirectory, config: RunConfig, fleet: Fleet, from_step: int | None) -> None:
    with RunConsole(config.iterations) as console, fleet:
        assert Experiment(config, run, fleet, console, lambda: False, from_step).run()


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four iterations, with a checkpoint after two."""
    config = small_config(**QUICK)
    run = RunDirectory.create(str(tmp_path_factory.mktemp("resume") / "run"), config)
    go_on(run, config, InlineFleet(fleet_plan(config)), None)
    return run.path


@pytest.mark.slow  # test_kill_everything.py resumes with another fleet
def test_more_samplers_and_reward_servers(
    ray_session: RaySession, inline: Path, tmp_path: Path
) -> None:
    shutil.copytree(inline, tmp_path / "run")
    config = small_config(num_samplers=3, num_reward_servers=2, **QUICK)
    run = RunDirectory(tmp_path / "run")
    go_on(run, config, RayFleet(fleet_plan(config), ray_session), 2)
    assert recorded(run.path) == recorded(inline)
    name = "checkpoints/step_000004/policy.safetensors"
    assert (run.path / name).read_bytes() == (inline / name).read_bytes()


@pytest.mark.slow  # test_learner_group.py restores a checkpoint of two learners with one
def test_two_learners_go_on_with_the_same_rollouts(
    ray_session: RaySession, inline: Path, tmp_path: Path
) -> None:
    """Their weights then differ by rounding, and so may later rollouts."""
    shutil.copytree(inline, tmp_path / "run")
    config = small_config(num_learners=2, **QUICK)
    run = RunDirectory(tmp_path / "run")
    go_on(run, config, RayFleet(fleet_plan(config), ray_session), 2)
    ours, theirs = recorded(run.path), recorded(inline)
    assert ours[:2] == theirs[:2]
    assert ours[2][1] == theirs[2][1]
    assert ours[2][0]["loss/grad_norm"] == pytest.approx(theirs[2][0]["loss/grad_norm"], rel=1e-4)
