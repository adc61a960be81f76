"""Groups of equal pods for the roles of a plan: how many, and what each pod needs. Arithmetic.

A pod is a Ray node; so is a machine, where there are no pods. Weights and images cross the network
once a node, so learners and samplers get pods as large as a machine allows; roles that scale get
the smallest, so that pods come and go one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from cluster.deploy.plan_document import DRIVER, LEARNER, MOMENTS_SERVER, PlanDocument, RolePlan
from cluster.errors import ConfigError
from cluster.placement.nodes import UNITS

MIB, GIB = 1 << 20, 1 << 30
RAYLET_BYTES = 2 * GIB  # raylet, agents, and the worker processes that Ray keeps ready
HEAD_BYTES = 4 * GIB  # control service, dashboard, job supervisor
HEAD_CPUS = 1  # for the same
STORE_SPARE = 1.25  # of the object store beside what the run may hold in it
LEAST_STORE_BYTES = GIB
SHARED = "shared"


@dataclass(frozen=True, kw_only=True)
class PodGroup:
    """Equal pods, and the roles whose workers they hold."""

    name: str
    """Of the group, and the value of the label `tessera-role` of its Ray nodes."""
    roles: tuple[RolePlan, ...]
    replicas: int
    min_replicas: int
    max_replicas: int
    workers: int
    """Workers in a pod, of the fullest one where roles share pods."""
    cpus: int
    gpus: int
    memory_bytes: int
    object_store_bytes: int

    @property
    def scales(self) -> bool:
        return self.min_replicas < self.max_replicas

    @property
    def learns(self) -> bool:
        """Whether its pods hold the learner, whose state is lost with them."""
        return any(role.name == LEARNER for role in self.roles)

    @property
    def accelerator_type(self) -> str:
        """Ray's name of the GPU, where all roles want the same one."""
        wanted = {role.accelerator_type for role in self.roles}
        return wanted.pop() if len(wanted) == 1 else ""


@dataclass(frozen=True, kw_only=True)
class HeadPod:
    """The head: Ray's control service, the driver and the moments server."""

    cpus: int
    ray_cpus: int
    """CPUs that Ray may give away: those of the moments server. The driver is no worker of Ray."""
    memory_bytes: int
    object_store_bytes: int


def head_of(plan: PlanDocument) -> HeadPod:
    driver, moments = plan.role(DRIVER), plan.role(MOMENTS_SERVER)
    ray_cpus = math.ceil(max(moments.num_cpus, 1))
    return HeadPod(
        cpus=HEAD_CPUS + ray_cpus + math.ceil(max(driver.num_cpus, 1)),
        ray_cpus=ray_cpus,
        memory_bytes=_rounded(
            HEAD_BYTES + driver.memory_bytes + moments.memory_bytes + store_of(plan)
        ),
        object_store_bytes=store_of(plan),
    )


def store_of(plan: PlanDocument) -> int:
    """Bytes of the object store of a pod, whole MiB."""
    wanted = max(plan.object_store_bytes * STORE_SPARE, LEAST_STORE_BYTES)
    return math.ceil(wanted / MIB) * MIB


def groups_of(plan: PlanDocument, gpus_per_node: int) -> list[PodGroup]:
    """One group for each role; roles with parts of GPUs share pods if the plan has no GPU for each.

    Args:
        gpus_per_node: the most GPUs of a pod.

    Raises:
        ConfigError: a worker needs more GPUs than a node has, or the plan more than it names.
    """
    for role in plan.workers:
        if role.num_gpus > gpus_per_node:
            raise ConfigError(
                f"a {role.name} takes {role.num_gpus:g} GPUs, but --gpus-per-node is "
                f"{gpus_per_node}: no pod spans machines"
            )
    alone = [_group_of(role, plan, gpus_per_node) for role in plan.workers]
    if _gpus(alone) <= plan.gpus:
        return alone
    parts = [role for role in plan.workers if 0 < role.num_gpus < 1]
    groups = [group for group in alone if group.roles[0] not in parts]
    if parts:
        groups.append(_shared_group(parts, plan, gpus_per_node))
    if _gpus(groups) > plan.gpus:
        raise ConfigError(
            f"the plan's workers need {_gpus(groups)} GPUs in pods, since no worker spans two "
            f"GPUs, but --gpus is {plan.gpus}: ask for {_gpus(groups)}"
        )
    return groups


def _gpus(groups: Sequence[PodGroup]) -> int:
    return sum(group.replicas * group.gpus for group in groups)


def _group_of(role: RolePlan, plan: PlanDocument, gpus_per_node: int) -> PodGroup:
    if not role.num_gpus:
        workers, gpus = 1, 0
    elif role.num_gpus >= 1:
        each = round(role.num_gpus)
        workers = 1 if role.scales else _largest_divisor(role.count, gpus_per_node // each)
        gpus = workers * each
    else:
        fitting = UNITS // round(role.num_gpus * UNITS)
        needed = math.ceil(role.count / fitting)
        gpus = 1 if role.scales else _largest_divisor(needed, gpus_per_node)
        workers = min(fitting * gpus, role.count)
    replicas = math.ceil(role.count / workers)
    return PodGroup(
        name=role.name.replace("_", "-"),
        roles=(role,),
        replicas=replicas,
        min_replicas=math.ceil(role.min / workers) if role.scales else replicas,
        max_replicas=math.ceil(role.max / workers) if role.scales else replicas,
        workers=workers,
        **_needs([role] * workers, plan),
        gpus=gpus,
        object_store_bytes=store_of(plan),
    )


def _shared_group(roles: Sequence[RolePlan], plan: PlanDocument, gpus_per_node: int) -> PodGroup:
    """Workers with parts of GPUs, the largest part first, each on the first GPU with room."""
    workers = [role for role in roles for _ in range(role.count)]
    gpus: list[list[RolePlan]] = []
    for worker in sorted(workers, key=lambda each: -each.num_gpus):
        room = next((gpu for gpu in gpus if _parts([*gpu, worker]) <= UNITS), None)
        if room is None:
            gpus.append(room := [])
        room.append(worker)
    size = _largest_divisor(len(gpus), gpus_per_node)
    pods = [list(chain(*gpus[at : at + size])) for at in range(0, len(gpus), size)]
    needs = [_needs(pod, plan) for pod in pods]
    return PodGroup(
        name=SHARED,
        roles=tuple(roles),
        replicas=len(pods),
        min_replicas=len(pods),
        max_replicas=len(pods),
        workers=max(map(len, pods)),
        cpus=max(each["cpus"] for each in needs),
        gpus=size,
        memory_bytes=max(each["memory_bytes"] for each in needs),
        object_store_bytes=store_of(plan),
    )


def _parts(workers: Sequence[RolePlan]) -> int:
    return sum(round(worker.num_gpus * UNITS) for worker in workers)


def _needs(workers: Sequence[RolePlan], plan: PlanDocument) -> dict[str, int]:
    """CPUs and bytes of a pod with these workers. A worker that names no CPUs reserves one at most
    (`cluster.scheduling.placement`)."""
    memory = sum(worker.memory_bytes for worker in workers)
    return {
        "cpus": math.ceil(sum(worker.num_cpus or 1 for worker in workers)),
        "memory_bytes": _rounded(RAYLET_BYTES + memory + store_of(plan)),
    }


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of a number that is at most `limit`, so that equal pods hold it."""
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)


def _rounded(size: int) -> int:
    """Up to whole GiB."""
    return math.ceil(size / GIB) * GIB
