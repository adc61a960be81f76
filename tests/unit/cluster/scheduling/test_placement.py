from __future__ import annotations

import pytest

from cluster.errors import ConfigError
from cluster.roles import FleetPlan, Resources, Role
from cluster.scheduling.placement import UNITS, Node, choose_gpus, place


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


def on_one(asked: FleetPlan, cpus: float, gpus: float = 0) -> list:
    return list(place(asked, [Node("here", cpus, gpus)]).roles)


def total(placements: list) -> float:
    return sum(p.count * p.num_cpus for p in placements)


@pytest.mark.parametrize(("samplers", "servers"), [(1, 1), (2, 1), (8, 4), (64, 32)])
def test_any_number_of_workers_fits_two_cores(samplers: int, servers: int) -> None:
    placements = on_one(plan(samplers, servers), cpus=2)
    assert total(placements) <= 2
    assert all(p.num_cpus > 0 for p in placements)


def test_nobody_takes_more_than_a_core_unasked() -> None:
    assert {p.num_cpus for p in on_one(plan(), cpus=64)} == {1.0}


def test_named_cpus_are_kept_and_the_rest_is_shared() -> None:
    placements = {p.role: p for p in on_one(plan(learner=Resources(num_cpus=4)), cpus=6)}
    assert placements["learner"].num_cpus == 4
    assert placements["sampler"].num_cpus == 0.5


def test_gpus_choose_the_device() -> None:
    asked = plan(samplers=4, sampler=Resources(num_gpus=0.25))
    placements = {p.role: p for p in on_one(asked, cpus=8, gpus=1)}
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
        (
            plan(
                samplers=1,
                learner=Resources(num_gpus=0.7),
                sampler=Resources(num_gpus=0.2),
                server=Resources(num_gpus=0.1),
            ),
            "asks for 1 GPU, but there are 0",
        ),
    ],
)
def test_what_cannot_fit_is_refused(asked: FleetPlan, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        on_one(asked, cpus=2)


# Nodes and fractions.


def gpu(share: float, **others: float) -> Resources:
    return Resources(num_gpus=share, **others)


def nodes(*gpus: float, cpus: float = 8) -> list[Node]:
    return [Node(f"node-{at}", cpus, each) for at, each in enumerate(gpus)]


@pytest.mark.parametrize(
    ("asked", "there", "without"),
    [
        (plan(samplers=3, sampler=gpu(0.6)), nodes(1, 1), r"sampler-2 \(1 CPU, 0\.6 GPU\)"),
        (plan(samplers=1, sampler=gpu(2)), nodes(1, 1), r"sampler \(1 CPU, 2 GPU\)"),
        (plan(samplers=1, learner=gpu(0.75), sampler=gpu(0.75)), nodes(1, 0.5), "sampler"),
        (plan(learner=gpu(1), samplers=1, sampler=gpu(0.5)), nodes(1.5, 0), None),
        (plan(learner=gpu(1), samplers=1, sampler=gpu(0.5)), nodes(0.75, 0.75), "learner"),
        (plan(learner=Resources(num_cpus=6)), nodes(0, 0, cpus=4), r"learner \(6 CPU, 0 GPU\)"),
        (plan(learner=gpu(1, num_cpus=6)), [Node("a", 8), Node("b", 2, 1)], "learner"),
    ],
)  # fmt: skip
def test_what_fits_the_sum_but_no_node_is_refused(
    asked: FleetPlan, there: list[Node], without: str | None
) -> None:
    if without is None:
        place(asked, there)
        return
    message = rf"fits the CPUs and GPUs of all nodes together, but no node has room for {without}"
    with pytest.raises(ConfigError, match=message):
        place(asked, there)


def test_the_refusal_shows_who_is_there_and_what_is_free() -> None:
    with pytest.raises(ConfigError) as caught:
        place(plan(learner=gpu(0.7), samplers=2, sampler=gpu(0.65)), nodes(1, 1))
    assert "beside the others with a GPU (learner 0.7, sampler-0 0.65)" in str(caught.value)
    assert "Free: node-0 (8 CPUs, 1 GPU), node-1 (8 CPUs, 1 GPU)" in str(caught.value)


def test_seats_name_node_and_gpu() -> None:
    asked = plan(samplers=2, learner=gpu(1), sampler=gpu(0.5), server=gpu(0.5))
    found = place(asked, [Node("cpus", 8), Node("gpus", 8, 3)])
    assert found.note == ""
    seats = {seat.worker: seat for seat in found.seats}
    assert seats["moments"].node == "cpus"  # Ray leaves nodes with GPUs to those that need them
    assert [str(seats[name]) for name in ("learner", "sampler-0", "sampler-1", "server")] == [
        "learner (GPU 0)",
        "sampler-0 (0.5 of GPU 1)",
        "sampler-1 (0.5 of GPU 1)",
        "server (0.5 of GPU 2)",
    ]


def test_a_fleet_that_ray_may_fail_to_place_has_a_note() -> None:
    """Ray spreads workers once a node is half used; two halves then leave no whole GPU."""
    asked = plan(samplers=1, learner=gpu(0.5), sampler=gpu(0.5), server=gpu(1))
    found = place(asked, nodes(1, 1))
    assert "may leave no room for server (1 CPU, 1 GPU)" in found.note
    placed = {seat.worker: seat.node for seat in found.seats}
    assert placed["learner"] == placed["sampler"] != placed["server"]
    assert place(asked, nodes(2)).note == ""  # within a node a fraction goes to the fullest GPU


def test_gpus_that_others_use_in_part_have_a_note() -> None:
    """1.5 free GPUs may be two of which .75 are left: no worker gets a whole one."""
    asked = plan(samplers=1, learner=gpu(1), sampler=gpu(0.5), server=gpu(0))
    assert "which parts Ray does not tell: free are node-0 (8 CPUs, 1.5 GPUs)" in (
        place(asked, nodes(1.5)).note
    )
    on_cpus = plan(samplers=1, learner=gpu(0), sampler=gpu(0), server=gpu(0))
    assert place(on_cpus, nodes(1.5)).note == ""


def test_largest_first_is_tried_too() -> None:
    asked = plan(samplers=2, learner=gpu(0.4), sampler=gpu(0.3), server=gpu(1))
    assert place(asked, nodes(1, 1)).seats  # .4 + .3 + .3, and 1


def test_equal_shares_fit_whole_into_each_node() -> None:
    """Seven workers on two nodes of two CPUs: of 4/7 CPU, three fit a node; so they get less."""
    found = place(plan(samplers=4, servers=1), nodes(0, 0, cpus=2))
    assert {role.num_cpus for role in found.roles} <= {0.57, 0.45}
    per_node = [sum(seat.node == f"node-{at}" for seat in found.seats) for at in (0, 1)]
    assert sum(per_node) == 7
    assert max(per_node) * found.roles[0].num_cpus <= 2


def test_choice_of_gpus_is_rays() -> None:
    free = [UNITS, 3000, 6000]
    assert choose_gpus(free, 2500) == [1]
    assert choose_gpus(free, 5000) == [2]
    assert choose_gpus(free, 7000) == [0]
    assert choose_gpus(free, UNITS) == [0]
    assert choose_gpus(free, 2 * UNITS) is None
    assert choose_gpus(free[1:], 6001) is None
    assert choose_gpus([], 0) == []


def test_many_workers_are_placed_quickly() -> None:
    found = place(plan(samplers=512, sampler=gpu(0.25)), nodes(*[8] * 16, cpus=64))
    gpus = [(seat.node, seat.gpus) for seat in found.seats if seat.gpus]
    assert len(gpus) == 512
    assert max(gpus.count(each) for each in set(gpus)) == 4


def test_resources_validate() -> None:
    with pytest.raises(ValueError, match="num_cpus and num_gpus must be >= 0"):
        Resources(num_gpus=-1)
    with pytest.raises(ValueError, match="num_threads must be >= 1"):
        Resources(num_threads=0)
