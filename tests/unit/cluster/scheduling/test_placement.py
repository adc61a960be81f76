from __future__ import annotations

import pytest

from cluster.errors import ConfigError
from cluster.roles import FleetPlan, Resources, Role
from cluster.scheduling.placement import place


def plan(samplers: int = 2, servers: int = 1, **resources: Resources) -> FleetPlan:
    def role(name: str, count: int = 1) -> Role:
        asked = resources.get(name, Resources())
        return Role(name=name, factory=object, config=None, resources=asked, count=count)

    return FleetPlan(
        sampler=role("sampler", samplers),
        reward_server=role("server", servers),
        moments_server=role("moments"),
        learner=role("learner"),
    )


def total(placements: list) -> float:
    return sum(p.count * p.num_cpus for p in placements)


@pytest.mark.parametrize(("samplers", "servers"), [(1, 1), (2, 1), (8, 4), (64, 32)])
def test_any_number_of_workers_fits_two_cores(samplers: int, servers: int) -> None:
    placements = place(plan(samplers, servers), cpus=2, gpus=0)
    assert total(placements) <= 2
    assert all(p.num_cpus > 0 for p in placements)


def test_nobody_takes_more_than_a_core_unasked() -> None:
    assert {p.num_cpus for p in place(plan(), cpus=64, gpus=0)} == {1.0}


def test_named_cpus_are_kept_and_the_rest_is_shared() -> None:
    placements = {p.role: p for p in place(plan(learner=Resources(num_cpus=4)), cpus=6, gpus=0)}
    assert placements["learner"].num_cpus == 4
    assert placements["sampler"].num_cpus == 0.5


def test_gpus_choose_the_device() -> None:
    asked = plan(samplers=4, sampler=Resources(num_gpus=0.25))
    placements = {p.role: p for p in place(asked, cpus=8, gpus=1)}
    assert placements["sampler"].device == "cuda"
    assert placements["learner"].device == "cpu"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            plan(learner=Resources(num_cpus=4)),
            "4 CPUs are asked for by name, and 4 workers would share the rest",
        ),
        (plan(samplers=500), "ask for fewer workers"),
        (plan(sampler=Resources(num_gpus=1)), "asks for 2 GPUs, but there are 0"),
    ],
)
def test_what_cannot_fit_is_refused(asked: FleetPlan, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place(asked, cpus=2, gpus=0)


def test_resources_validate() -> None:
    with pytest.raises(ValueError, match="num_cpus and num_gpus must be >= 0"):
        Resources(num_gpus=-1)
    with pytest.raises(ValueError, match="num_threads must be >= 1"):
        Resources(num_threads=0)
