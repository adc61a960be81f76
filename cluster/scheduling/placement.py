"""What each worker reserves, and the node and GPUs on which it fits. Arithmetic without Ray.

A sum over the cluster is not enough: two workers with .75 GPU each fit no two halves, one with two
GPUs fits no two nodes of one, and labels leave a worker some of the nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.placement.nodes import UNITS, Node, Request, Room, Seat
from cluster.placement.refusal import NoRoomError, excluded, explain, listed
from cluster.placement.seating import Gang, Preference, Unseated, arrange
from cluster.roles import FleetPlan, Role
from cluster.scheduling.quota import RunQuota, Share

SMALLEST_SHARE = 0.01  # CPUs
SMALLER = 0.8  # factor of a CPU share that does not fit the nodes


@dataclass(frozen=True)
class Placement:
    """What every worker of one role reserves."""

    role: str
    count: int
    num_cpus: float
    num_gpus: float
    device: str
    num_threads: int
    labels: Mapping[str, str] = field(default_factory=dict)
    accelerator_type: str = ""


@dataclass(frozen=True)
class FleetPlacement:
    """All workers of a fleet."""

    roles: tuple[Placement, ...]
    seats: tuple[Seat, ...]
    """An arrangement that fits, in the order in which workers start. Placement groups keep to it
    as long as its nodes have room."""
    gangs: tuple[Gang, ...]
    """Which workers must be on one node; most are alone."""
    note: str = ""
    """Why a worker may wait although the fleet fits; empty if none should."""


def place(plan: FleetPlan, nodes: Sequence[Node]) -> FleetPlacement:
    """Compute the reservations of all workers, and check that they fit the nodes.

    Workers without `num_cpus` share what the others leave; there may be more workers than cores.

    Raises:
        NoRoomError: more is asked for than there is, or no node has room for a worker.
    """
    counts = {role.name: role.count for role in plan.roles}
    named = {r.name: Share(r.resources.num_cpus, r.resources.num_gpus) for r in plan.roles}
    RunQuota(plan.quota, named).check(counts)
    _check_exclusions(gangs_of(plan, 1.0), nodes)
    share = _cpu_share(plan, nodes)
    _check_gpus(plan, nodes)
    preferences = _preferences(plan)
    least = min(share, SMALLEST_SHARE)
    found, gangs = arrange(gangs_of(plan, least), nodes, preferences), gangs_of(plan, share)
    if isinstance(found, Unseated):
        without = [request.worker for request in found.gang]
        asked = next(gang for gang in gangs if [each.worker for each in gang] == without)
        raise NoRoomError(_refusal(Unseated(asked, found.rooms, found.certain)))
    # Equal shares of the sum need not fit whole into each node.
    while isinstance(larger := arrange(gangs, nodes, preferences, every=False), Unseated):
        if share <= least or all(role.resources.num_cpus for role in plan.roles):
            larger = found
            break
        share = max(math.floor(share * SMALLER * 100) / 100, least)
        gangs = gangs_of(plan, share)
    note = _order_note(gangs, larger, nodes) or _others_note(gangs, nodes)
    roles = tuple(_reserved(role, share) for role in plan.roles)
    quota_of(plan, roles).check(counts)
    return FleetPlacement(roles, tuple(larger), tuple(gangs), note)


def quota_of(plan: FleetPlan, roles: Iterable[Placement]) -> RunQuota:
    """The quota of a plan whose workers reserve this."""
    shares = {role.role: Share(role.num_cpus, role.num_gpus) for role in roles}
    return RunQuota(plan.quota, shares)


def _cpu_share(plan: FleetPlan, nodes: Sequence[Node]) -> float:
    """CPUs of each worker that names none, at most one."""
    cpus = plan.quota.of_cpus(sum(node.cpus for node in nodes))
    fixed = sum(role.count * role.resources.num_cpus for role in plan.roles)
    sharing = sum(role.max_count for role in plan.roles if role.resources.num_cpus == 0)
    share = min(1.0, math.floor((cpus - fixed) / max(sharing, 1) * 100) / 100)
    if fixed > cpus or (sharing and share < SMALLEST_SHARE):
        asked = f"{fixed:g} CPUs are asked for by name, and " if fixed else ""
        raise NoRoomError(
            f"the fleet does not fit {cpus:g} CPUs: {asked}{sharing} workers would share the rest, "
            f"less than {SMALLEST_SHARE:g} each; ask for fewer workers, or fewer CPUs by name"
            f"{_by_node(nodes)}"
        )
    return share


def _check_gpus(plan: FleetPlan, nodes: Sequence[Node]) -> None:
    gpus = sum(node.gpus for node in nodes)
    wanted = round(sum(role.count * role.resources.num_gpus for role in plan.roles), 4)  # UNITS
    if wanted > round(gpus, 4):
        raise NoRoomError(
            f"the fleet asks for {wanted:g} GPU{'s' * (wanted != 1)}, but there are "
            f"{gpus:g}: lower num_gpus "
            "(fractions share one GPU, 0 computes on the CPU) or the number of workers"
            f"{_by_node(nodes)}"
        )


def _by_node(nodes: Sequence[Node]) -> str:
    """What is free of each, where there are several."""
    return f". Free: {listed(nodes)}" if len(nodes) > 1 else ""


def _check_exclusions(gangs: Sequence[Gang], nodes: Sequence[Node]) -> None:
    """
    Raises:
        NoRoomError: labels and accelerator types leave a worker no node, whatever is free.
    """
    for gang in gangs:
        if all(excluded(node, gang) for node in nodes):
            why = explain(Unseated(gang, [Room(node) for node in nodes], certain=True))
            role = gang[0].role
            raise NoRoomError(
                f"{why}\nchange labels or accelerator_type of the role {role}, or start a node "
                "that has them (ray start --labels KEY=VALUE)"
            )


def _preferences(plan: FleetPlan) -> dict[str, Preference]:
    asked = plan.placement
    servers: Preference = "spread" if asked.reward_servers == "spread" else "any"
    learners: Preference = "pack" if asked.learners == "pack" else "any"
    return {plan.learner.name: learners, **{role.name: servers for role in plan.servers}}


def _reserved(role: Role, share: float) -> Placement:
    asked = role.resources
    return Placement(
        role.name,
        role.count,
        asked.num_cpus or share,
        asked.num_gpus,
        asked.device,
        asked.num_threads,
        asked.labels,
        asked.accelerator_type,
    )


def request_of(role: Role, index: int, share: float) -> Request:
    """What a worker asks for.

    Args:
        share: CPUs of one that names none.
    """
    asked = role.resources
    return Request(
        role.worker_name(index),
        role.name,
        round((asked.num_cpus or share) * UNITS),
        round(asked.num_gpus * UNITS),
        asked.labels,
        asked.accelerator_type,
    )


def gangs_of(plan: FleetPlan, share: float) -> list[Gang]:
    """All workers in the order in which the fleet starts them, those that must be on one node
    together: a sampler with its reward server, where the plan asks for it."""
    requests = {
        role.name: [request_of(role, index, share) for index in range(role.count)]
        for role in plan.roles
    }
    found: list[Gang] = []
    samplers, servers = (requests.get(role.name, []) for role in (plan.sampler, plan.reward_server))
    groups = min(len(samplers), len(servers)) if plan.placement.samplers_with_reward_servers else 0
    for role in plan.roles:
        if groups and role is plan.sampler:
            found += [(*samplers[at::groups], *servers[at::groups]) for at in range(groups)]
        elif not (groups and role is plan.reward_server):
            found += [(request,) for request in requests[role.name]]
    return found


def _refusal(without: Unseated) -> str:
    return (
        "the fleet fits the CPUs and GPUs of all nodes together, but "
        f"{explain(without)}\na worker is on one node; fractions of one GPU add up to 1 at most, "
        "and whole GPUs are not shared: change num_gpus, num_cpus, labels or the number of workers"
    )


def _order_note(gangs: Sequence[Gang], seats: Sequence[Seat], nodes: Sequence[Node]) -> str:
    """Empty if the GPUs of each node are shared as Ray will share them, in the order in which
    workers start."""
    rooms = {(node.name, node.id): Room(node) for node in nodes}
    for request, seat in zip((each for gang in gangs for each in gang), seats, strict=True):
        room = rooms[seat.node, seat.node_id]
        gpus = room.chosen(request)
        if gpus is None:
            return (
                f"the fleet fits, but Ray gives a fraction to the fullest GPU with room, and may "
                f"leave none for {request} on {room.node}, which would then not start. Fractions "
                "that add up to one GPU in several ways (num_gpus) leave it room"
            )
        room.take(request, gpus)
    return ""


def _others_note(gangs: Sequence[Gang], nodes: Sequence[Node]) -> str:
    """Empty where no GPU is partly in use by others, or none is asked for."""
    partly = [node for node in nodes if round(node.gpus * UNITS) % UNITS]
    if not partly or not any(request.gpus for gang in gangs for request in gang):
        return ""
    return (
        "others use parts of GPUs, and which parts Ray does not tell: free are "
        f"{listed(partly)}. If that is of several "
        "GPUs, a worker that needs more than is left of each would not start"
    )
