"""Deployment files of KubeRay against the run that they start: its parser takes the entrypoint, and
its workers have room in the pods that they select."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.deploy.command import parse as parse_deploy
from cluster.deploy.kuberay.files import files
from cluster.deploy.plan_document import PlanDocument, read_plan
from cluster.placement.nodes import Node
from cluster.roles import Role
from cluster.scheduling.placement import place
from learner import plan as planner
from learner import run
from learner.fleet_plan import fleet_plan
from tests.unit.cluster.deploy.test_run_command import through_job_submit

SPLITS = {
    "one GPU": ["--preset", "llamagen-b-256"],
    "eight": ["--preset", "llamagen-b-256", "--num-samplers", "5", "--sampler.num-gpus", "1",
              "--num-reward-servers", "4", "--reward.num-gpus", "0.5", "--learner.num-gpus", "1",
              "--conditions.template", "an $ 'image' of \"a\" {}"],
    "learners": ["--preset", "llamagen-b-256", "--num-samplers", "16", "--sampler.num-gpus", "1",
                 "--num-learners", "4", "--learner.num-gpus", "1", "--num-reward-servers", "8",
                 "--reward.num-gpus", "0.25", "--reward.min", "4", "--reward.max", "16"],
    "CPUs": ["--preset", "miniature", "--reward.max", "3"],
}  # fmt: skip


def plan_of(given: list[str], capsys: pytest.CaptureFixture[str]) -> PlanDocument:
    assert planner.main(["--json", *given]) == 0
    return read_plan(capsys.readouterr().out, "learner.plan")


def job_of(plan: PlanDocument, *more: str) -> dict[str, Any]:
    given = ["kuberay", "--preset", plan.preset, "--gpus", str(plan.gpus), "--image", "a.b/c:1"]
    found = files(plan, parse_deploy([*given, *more])[1])
    path = next(each for each in found if each.endswith("rayjob.yaml"))
    spec: dict[str, Any] = yaml.safe_load(found[path])["spec"]
    return spec


def fits(role: Role, pods: int, cpus: float, gpus: int) -> bool:
    """Whether the workers of a role alone have room in equal pods, each filled in turn."""
    need = role.resources.num_cpus or 1.0  # at most: `cluster.scheduling.placement`
    each = math.floor(cpus / need + 1e-9)
    if role.resources.num_gpus >= 1:
        each = min(each, int(gpus // role.resources.num_gpus))
    elif role.resources.num_gpus:
        each = min(each, gpus * int(1 / role.resources.num_gpus + 1e-9))
    return pods * each >= role.count


@pytest.mark.parametrize("given", SPLITS.values(), ids=SPLITS)
def test_the_run_fits_the_pods_that_it_selects(
    given: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    job = job_of(plan_of(given, capsys), "--mount-path", str(tmp_path))
    arguments = through_job_submit(job["entrypoint"])
    assert arguments[:3] == ["python", "-m", "learner.run"]
    command, config, target = run.parse(arguments[3:])
    assert command.auto_resume
    assert target.path == tmp_path / "runs" / "tessera"
    fleet = fleet_plan(config)
    groups = job["rayClusterSpec"]["workerGroupSpecs"]
    roles = [fleet.learner, fleet.sampler, fleet.reward_server]
    for role in roles:
        (group,) = (
            each for each in groups if role.resources.labels.items() <= each["labels"].items()
        )
        start = group["rayStartParams"]
        room = float(start["num-cpus"]), int(start["num-gpus"])
        assert fits(role, group["replicas"], *room), role.name
        if role.autoscale.on and group["groupName"] != "shared":
            assert group["maxReplicas"] * fitting(role, *room) >= role.max_count
    head = job["rayClusterSpec"]["headGroupSpec"]
    pods = [head] + [group for group in groups for _ in range(group["replicas"])]
    seats = place(fleet, [node_of(pod, number) for number, pod in enumerate(pods)]).seats
    assert len(seats) == sum(role.count for role in fleet.roles)
    given_gpus = sum(each["replicas"] * int(each["rayStartParams"]["num-gpus"]) for each in groups)
    assert given_gpus >= sum(role.count * role.resources.num_gpus for role in roles)
    moments = fleet.moments_server.resources.num_cpus or 1.0
    assert float(job["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"]) >= moments


def node_of(pod: dict[str, Any], number: int) -> Node:
    """The Ray node of a pod, with nothing running on it."""
    start = pod["rayStartParams"]
    return Node(
        f"pod-{number}", float(start["num-cpus"]), float(start["num-gpus"]), labels=pod["labels"]
    )


def fitting(role: Role, cpus: float, gpus: int) -> int:
    """Workers of a role in one pod."""
    return next(
        count - 1 for count in range(1, 1000) if not fits(_with_count(role, count), 1, cpus, gpus)
    )


def _with_count(role: Role, count: int) -> Role:
    return replace(role, count=count)


def test_options_behind_two_dashes_arrive_once(capsys: pytest.CaptureFixture[str]) -> None:
    further = ["--iterations", "7", "--rewards.clip.weight", "2"]
    plan = plan_of(["--preset", "llamagen-b-256", *further], capsys)
    arguments = through_job_submit(job_of(plan, "--", *further)["entrypoint"])
    assert arguments.count("--iterations") == 1
    _, config, _ = run.parse(arguments[3:])
    assert (config.iterations, config.rewards.clip.weight) == (7, 2.0)
