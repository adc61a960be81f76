"""What each worker reserves, and the node and GPUs on which it fits. Arithmetic without Ray.

A sum over the cluster is not enough: two workers with .75 GPU each fit no two halves, and one with
two GPUs fits no two nodes of one. Ray places actors one after another, each on a node of its own
choice, and never moves them; within a node a fraction goes to the fullest GPU that has room.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.errors import ConfigError
from cluster.roles import FleetPlan, Role
from cluster.scheduling.quota import RunQuota, Share

SMALLEST_SHARE = 0.01  # CPUs
UNITS = 10_000  # of a CPU or GPU: how finely Ray counts them
SPREAD = 0.5  # share in use from which Ray prefers another node
SHOWN = 8  # nodes or workers that a message names
SMALLER = 0.8  # factor of a CPU share that does not fit the nodes


@dataclass(frozen=True)
class Node:
    """A machine, and what is free of it."""

    name: str
    cpus: float
    gpus: float = 0.0
    """The fraction is taken for one GPU that is partly in use; Ray tells the sum alone."""

    def __str__(self) -> str:
        return f"{self.name} ({self.cpus:g} CPUs, {self.gpus:g} GPU{'s' * (self.gpus != 1)})"


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
class Seat:
    """Where one worker fits."""

    worker: str
    node: str
    gpus: tuple[int, ...] = ()
    """Numbers of the GPUs on the node."""
    num_gpus: float = 0.0

    def __str__(self) -> str:
        if not self.gpus:
            return self.worker
        part = f"{self.num_gpus:g} of " if self.num_gpus < 1 else ""
        return f"{self.worker} ({part}GPU {', '.join(map(str, self.gpus))})"


@dataclass(frozen=True)
class FleetPlacement:
    """All workers of a fleet."""

    roles: tuple[Placement, ...]
    seats: tuple[Seat, ...]
    """One arrangement that fits. Ray may choose another."""
    note: str = ""
    """Why a worker may wait although the fleet fits; empty if none should."""


@dataclass(frozen=True)
class _Request:
    """What one worker asks for, in units."""

    worker: str
    cpus: int
    gpus: int

    def __str__(self) -> str:
        return f"{self.worker} ({self.cpus / UNITS:g} CPU, {self.gpus / UNITS:g} GPU)"


class _Room:
    """What is left of a node, in units."""

    def __init__(self, node: Node) -> None:
        whole, part = divmod(round(node.gpus * UNITS), UNITS)
        self.node, self.cpus = node, round(node.cpus * UNITS)
        self.gpus = [UNITS] * whole + [part] * (part > 0)
        self._all = self.cpus, sum(self.gpus)

    def chosen(self, request: _Request) -> list[int] | None:
        """The GPUs that the request would get; None: it does not fit."""
        return choose_gpus(self.gpus, request.gpus) if request.cpus <= self.cpus else None

    def take(self, request: _Request, gpus: Sequence[int]) -> Seat:
        self.cpus -= request.cpus
        for gpu in gpus:
            self.gpus[gpu] -= min(request.gpus, UNITS)
        return Seat(request.worker, self.node.name, tuple(gpus), request.gpus / UNITS)

    @property
    def in_use(self) -> float:
        """Share of the CPUs or of the GPUs, whichever is larger."""
        left = self.cpus, sum(self.gpus)
        return max((1 - now / all for now, all in zip(left, self._all) if all), default=1.0)


def choose_gpus(free: Sequence[int], units: int) -> list[int] | None:
    """The GPUs of a node that Ray gives a worker: unused ones for whole GPUs, the fullest one with
    room for a fraction.

    Args:
        free: units that are free of each GPU.

    Returns:
        Their numbers; None if there are none.
    """
    if units >= UNITS:
        unused = [number for number, left in enumerate(free) if left == UNITS]
        return unused[: units // UNITS] if len(unused) >= units // UNITS else None
    fitting = [number for number, left in enumerate(free) if left >= units]
    return sorted(fitting, key=free.__getitem__)[:1] or None if units else []


def place(plan: FleetPlan, nodes: Sequence[Node]) -> FleetPlacement:
    """Compute the reservations of all workers, and check that they fit the nodes.

    Workers without `num_cpus` share what the others leave; there may be more workers than cores.

    Raises:
        ConfigError: more is asked for than there is, or no node has room for a worker.
    """
    counts = {role.name: role.count for role in plan.roles}
    named = {role.name: Share(role.resources.num_cpus, role.resources.num_gpus) for role in plan.roles}
    RunQuota(plan.quota, named).check(counts)
    share = _cpu_share(plan, plan.quota.of_cpus(sum(node.cpus for node in nodes)))
    _check_gpus(plan, sum(node.gpus for node in nodes))
    asked = _requests(plan, share)
    if isinstance(without := _packed(_requests(plan, SMALLEST_SHARE), nodes), _Request):
        raise ConfigError(_refusal(without, asked, nodes))
    # Equal shares of the sum need not fit whole into each node.
    while isinstance(found := _packed(asked, nodes), _Request):
        share = max(math.floor(share * SMALLER * 100) / 100, SMALLEST_SHARE)
        asked = _requests(plan, share)
    by_ray, note = _seat(asked, nodes, _as_ray), ""
    if isinstance(by_ray, _Request):
        note = _warning(by_ray, nodes)
    else:
        found, note = by_ray, _others_note(asked, nodes)
    roles = tuple(_reserved(role, share) for role in plan.roles)
    quota_of(plan, roles).check(counts)
    return FleetPlacement(roles, tuple(found), note)


def quota_of(plan: FleetPlan, roles: Iterable[Placement]) -> RunQuota:
    """The quota of a plan whose workers reserve this."""
    shares = {role.role: Share(role.num_cpus, role.num_gpus) for role in roles}
    return RunQuota(plan.quota, shares)


def _cpu_share(plan: FleetPlan, cpus: float) -> float:
    """CPUs of each worker that names none, at most one."""
    fixed = sum(role.count * role.resources.num_cpus for role in plan.roles)
    sharing = sum(role.max_count for role in plan.roles if role.resources.num_cpus == 0)
    share = min(1.0, math.floor((cpus - fixed) / max(sharing, 1) * 100) / 100)
    if fixed > cpus or (sharing and share < SMALLEST_SHARE):
        asked = f"{fixed:g} CPUs are asked for by name, and " if fixed else ""
        raise ConfigError(
            f"the fleet does not fit {cpus:g} CPUs: {asked}{sharing} workers would share the rest, "
            f"less than {SMALLEST_SHARE:g} each; ask for fewer workers, or fewer CPUs by name"
        )
    return share


def _check_gpus(plan: FleetPlan, gpus: float) -> None:
    wanted = round(sum(role.count * role.resources.num_gpus for role in plan.roles), 4)  # UNITS
    if wanted > round(gpus, 4):
        raise ConfigError(
            f"the fleet asks for {wanted:g} GPU{'s' * (wanted != 1)}, but there are "
            f"{gpus:g}: lower num_gpus "
            "(fractions share one GPU, 0 computes on the CPU) or the number of workers"
        )


def _reserved(role: Role, share: float) -> Placement:
    asked = role.resources
    cpus = asked.num_cpus or share
    return Placement(
        role.name,
        role.count,
        cpus,
        asked.num_gpus,
        asked.device,
        asked.num_threads,
        asked.labels,
        asked.accelerator_type,
    )


def _requests(plan: FleetPlan, share: float) -> list[_Request]:
    """What the workers ask for, in the order in which the fleet starts them."""
    return [
        _Request(
            role.worker_name(index),
            round((role.resources.num_cpus or share) * UNITS),
            round(role.resources.num_gpus * UNITS),
        )
        for role in plan.roles
        for index in range(role.count)
    ]


def _as_ray(room: _Room, request: _Request) -> tuple[float, ...]:
    """Preference of a node, lowest first, as Ray's default: nodes without GPUs for workers without,
    those in use up to `SPREAD` in order, then the least used."""
    in_use = room.in_use
    return (not request.gpus and bool(room.gpus)), (in_use if in_use >= SPREAD else 0.0)


def _fullest(room: _Room, request: _Request) -> tuple[float, ...]:
    return (not request.gpus and bool(room.gpus)), sum(room.gpus), room.cpus


def _seat(
    requests: Sequence[_Request],
    nodes: Sequence[Node],
    preference: Callable[[_Room, _Request], tuple[float, ...]],
) -> list[Seat] | _Request:
    """Place workers one after another; returns their places, or the first one without room."""
    rooms, seats = [_Room(node) for node in nodes], list[Seat]()
    for request in requests:
        found = [(room, gpus) for room in rooms if (gpus := room.chosen(request)) is not None]
        if not found:
            return request
        room, gpus = min(found, key=lambda each: preference(each[0], request))
        seats.append(room.take(request, gpus))
    return seats


def _packed(requests: Sequence[_Request], nodes: Sequence[Node]) -> list[Seat] | _Request:
    """The fullest node with room for each: in order, else with the largest first."""
    found = _seat(requests, nodes, _fullest)
    if not isinstance(found, _Request):
        return found
    largest_first = sorted(requests, key=lambda each: (-each.gpus, -each.cpus))
    packed = _seat(largest_first, nodes, _fullest)
    return found if isinstance(packed, _Request) else packed


def _refusal(without: _Request, requests: Sequence[_Request], nodes: Sequence[Node]) -> str:
    without = next(each for each in requests if each.worker == without.worker)
    beside = [each for each in requests if each is not without and each.gpus]
    shares = _listed([f"{each.worker} {each.gpus / UNITS:g}" for each in beside])
    others = f" beside the others with a GPU ({shares})"
    return (
        f"the fleet fits the CPUs and GPUs of all nodes together, but no node has room for "
        f"{without}{others if without.gpus and beside else ''}. Free: "
        f"{_listed(nodes)}. A worker is on one node; "
        "fractions of one GPU add up to 1 at most, and whole GPUs are not shared: change num_gpus, "
        "num_cpus or the number of workers"
    )


def _warning(waits: _Request, nodes: Sequence[Node]) -> str:
    return (
        "the fleet fits, but Ray places workers one after another, on nodes of its own choice, and "
        f"may leave no room for {waits}, which would then not start. Free: {_listed(nodes)}. Fewer "
        "or smaller shares "
        "(num_gpus) leave it room"
    )


def _others_note(requests: Sequence[_Request], nodes: Sequence[Node]) -> str:
    """Empty where no GPU is partly in use by others, or none is asked for."""
    partly = [node for node in nodes if round(node.gpus * UNITS) % UNITS]
    if not partly or not any(request.gpus for request in requests):
        return ""
    return (
        "others use parts of GPUs, and which parts Ray does not tell: free are "
        f"{_listed(partly)}. If that is of several "
        "GPUs, a worker that needs more than is left of each would not start"
    )


def _listed(items: Sequence[object]) -> str:
    return ", ".join([*map(str, items[:SHOWN]), *["..."] * (len(items) > SHOWN)])
