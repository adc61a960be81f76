"""Machines of AWS for the workers of a plan, and how many of each. Arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.deploy.groups import SHARED, PodGroup, groups_of
from cluster.deploy.plan_document import PlanDocument
from cluster.errors import ConfigError


@dataclass(frozen=True)
class Machine:
    """An instance type."""

    name: str
    cpus: int
    gpus: int = 0


@dataclass(frozen=True, kw_only=True)
class NodeType:
    """Equal machines of a cluster, and how many."""

    name: str
    """Also the value of the label `tessera-role`."""
    machine: Machine
    minimum: int
    maximum: int
    roles: tuple[str, ...]
    """Roles whose workers select this type by its label; empty: no role names it."""


CPU_MACHINE = Machine("m7i.8xlarge", 32)
MACHINES = {
    "h200": (Machine("p5en.48xlarge", 192, 8),),
    "h100": (Machine("p5.4xlarge", 16, 1), Machine("p5.48xlarge", 192, 8)),
    "a100": (Machine("p4de.24xlarge", 96, 8),),
    "l40s": (
        Machine("g6e.4xlarge", 16, 1),
        Machine("g6e.24xlarge", 96, 4),
        Machine("g6e.48xlarge", 192, 8),
    ),
}
"""By learner.plan's name of the GPU, the smallest first. From memory: to be checked
against AWS's list of instance types."""
MOST_GPUS = 8


def machines_of(gpu: str) -> Sequence[Machine]:
    """Machines with a kind of GPU.

    Raises:
        ConfigError: AWS has none.
    """
    if gpu not in MACHINES:
        raise ConfigError(
            f"AWS has no machine with {gpu or 'an unnamed GPU'} among {', '.join(MACHINES)}: name "
            "one of these by --gpu, or your own machines by --head-ip and --worker-ip"
        )
    return MACHINES[gpu]


def node_types(plan: PlanDocument) -> list[NodeType]:
    """A type of node for each role's workers. Roles share machines if the plan's GPUs do not fill
    machines for each role alone.

    Raises:
        ConfigError: AWS has no machine with the plan's GPU.
    """
    groups = groups_of(plan, MOST_GPUS)
    types = [_type_of(group, plan) for group in groups]
    bought = sum(each.minimum * each.machine.gpus for each in types if each.machine.gpus)
    if bought <= plan.gpus:
        return types
    without = [each for each in types if not each.machine.gpus]
    return [_shared_type(groups, plan), *without]


def _type_of(group: PodGroup, plan: PlanDocument) -> NodeType:
    if group.gpus:
        machines = machines_of(plan.gpu)
        machine = next((m for m in machines if m.gpus >= group.gpus), machines[-1])
        per_machine = max(machine.gpus // group.gpus, 1)
    else:
        machine, per_machine = CPU_MACHINE, max(CPU_MACHINE.cpus // group.cpus, 1)
    return NodeType(
        name=group.name,
        machine=machine,
        minimum=math.ceil(group.min_replicas / per_machine),
        maximum=math.ceil(group.max_replicas / per_machine),
        roles=tuple(role.name for role in group.roles),
    )


def _shared_type(groups: Sequence[PodGroup], plan: PlanDocument) -> NodeType:
    """The GPUs of all roles on as few machines as hold them."""
    machines = machines_of(plan.gpu)
    machine = next((m for m in machines if m.gpus >= plan.gpus), machines[-1])
    most = sum(group.max_replicas * group.gpus for group in groups)
    minimum = math.ceil(plan.gpus / machine.gpus)
    maximum = max(math.ceil(most / machine.gpus), minimum)
    return NodeType(name=SHARED, machine=machine, minimum=minimum, maximum=maximum, roles=())
