"""Groups of pods: every worker has room, GPUs add up, and only what scales changes in number."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.deploy.groups import GIB, PodGroup, groups_of, head_of
from cluster.deploy.plan_document import PlanDocument, read_plan
from cluster.errors import ConfigError
from tests.unit.cluster.deploy.plans import (
    cpus,
    document,
    eight_gpus,
    many_gpus,
    one_gpu,
    role,
    text,
)


def plan_of(values: dict[str, Any]) -> PlanDocument:
    return read_plan(text(values), "plan")


def shape(groups: list[PodGroup]) -> dict[str, tuple[int, int, int, int, int]]:
    """Name -> replicas, least and most of them, GPUs and CPUs of a pod."""
    return {
        each.name: (each.replicas, each.min_replicas, each.max_replicas, each.gpus, each.cpus)
        for each in groups
    }


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # one GPU: the roles share it
        (one_gpu(), {"shared": (1, 1, 1, 1, 3)}),
        # learners and samplers in large pods, four reward servers of a quarter on a GPU
        (
            eight_gpus(),
            {"learner": (1, 1, 1, 2, 8), "sampler": (1, 1, 1, 4, 8),
             "reward-server": (2, 1, 4, 1, 8)},
        ),
        # 40 samplers on machines of 8; a pool has a group of its own
        (
            many_gpus(),
            {"learner": (1, 1, 1, 8, 8), "sampler": (5, 5, 5, 8, 8),
             "reward-server": (14, 7, 16, 1, 2), "reward-fid": (1, 1, 1, 2, 2)},
        ),
        (
            cpus(),
            {"learner": (1, 1, 1, 0, 1), "sampler": (2, 2, 2, 0, 1),
             "reward-server": (2, 2, 4, 0, 1)},
        ),
    ],
    ids=["1", "8", "64", "cpus"],
)  # fmt: skip
def test_groups(values: dict[str, Any], expected: dict[str, Any]) -> None:
    assert shape(groups_of(plan_of(values), 8)) == expected


@pytest.mark.parametrize(
    ("count", "per_node", "pods"),
    [(40, 8, (5, 8)), (7, 4, (7, 1)), (12, 8, (2, 6)), (9, 4, (3, 3))],
)
def test_equal_pods_hold_the_samplers(count: int, per_node: int, pods: tuple[int, int]) -> None:
    values = document(
        count + 1, role("learner", num_gpus=0.5), role("reward-server", num_gpus=0.5),
        role("sampler", count, num_gpus=1),
    )  # fmt: skip
    found = {each.name: each for each in groups_of(plan_of(values), per_node)}
    assert (found["sampler"].replicas, found["sampler"].gpus) == pods
    assert found["shared"].gpus == 1  # learner and reward server


def test_what_does_not_fit_is_refused() -> None:
    wide = document(
        4, role("learner", num_gpus=4), role("sampler"), role("reward-server"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"a learner takes 4 GPUs, but --gpus-per-node is 2"):
        groups_of(plan_of(wide), 2)
    # three workers of .6 do not fit two GPUs, although 1.8 is less than 2
    split = document(
        2, role("learner", num_gpus=0.6), role("sampler", num_gpus=0.6),
        role("reward-server", num_gpus=0.6),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"need 3 GPUs in pods.* --gpus is 2: ask for 3"):
        groups_of(plan_of(split), 8)


def test_memory_holds_workers_store_and_ray() -> None:
    plan = plan_of(eight_gpus())
    for group in groups_of(plan, 8):
        assert group.object_store_bytes >= plan.object_store_bytes
        workers = group.workers * group.roles[0].memory_bytes
        assert group.memory_bytes >= workers + group.object_store_bytes + 2 * GIB
    assert head_of(plan).memory_bytes >= 8_000_000_000 + plan.object_store_bytes
    small = plan_of(eight_gpus() | {"object_store_bytes": 0})
    assert {each.object_store_bytes for each in groups_of(small, 8)} == {GIB}  # Ray needs some


FRACTIONS = st.sampled_from([0.1, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0, 2.0])


@st.composite
def fleets(draw: st.DrawFn) -> dict[str, Any]:
    roles = []
    for name in ("learner", "sampler", "reward-server"):
        count = draw(st.integers(1, 12))
        most = draw(st.integers(count, 14)) if name == "reward-server" else count
        roles.append(
            role(
                name, count, max=most, num_gpus=draw(FRACTIONS),
                num_cpus=draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
            )
        )  # fmt: skip
    asked = sum(each["count"] * each["num_gpus"] for each in roles)
    return document(math.ceil(asked) + draw(st.integers(0, 6)), *roles)


@settings(max_examples=150, deadline=None)
@given(fleets(), st.sampled_from([2, 4, 8]))
def test_every_worker_of_any_plan_has_room(values: dict[str, Any], per_node: int) -> None:
    plan = plan_of(values)
    try:
        groups = groups_of(plan, per_node)
    except ConfigError:
        return
    assert sum(each.replicas * each.gpus for each in groups) <= plan.gpus
    assert sorted(each.name for group in groups for each in group.roles) == sorted(
        each.name for each in plan.workers
    )
    for group in groups:
        assert 0 < group.gpus <= per_node
        assert group.min_replicas <= group.replicas <= group.max_replicas
        # first fit, the largest first, on the GPUs of all pods
        free = [1.0] * (group.gpus * group.replicas)
        asked = sorted((r.num_gpus for r in group.roles for _ in range(r.count)), reverse=True)
        for need in asked:
            for _ in range(math.ceil(need)):
                part = min(need, 1.0)
                at = next(n for n, left in enumerate(free) if left >= part - 1e-9)
                free[at] -= part
        cores = sum(role.count * (role.num_cpus or 1) for role in group.roles)
        assert group.cpus * group.replicas >= cores
