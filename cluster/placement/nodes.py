"""Nodes, what is free of them, and how a node's GPUs are given to workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.placement.labels import unmet, written

UNITS = 10_000  # of a CPU or GPU: how finely Ray counts them
TYPE_RESOURCE = "accelerator_type:"
"""Ray's resource of a node with GPUs, followed by their kind."""
TYPE_SHARE = 0.001  # of it, as Ray's own option takes


@dataclass(frozen=True)
class Node:
    """A machine, and what is free of it."""

    name: str
    cpus: float
    gpus: float = 0.0
    """The fraction is taken for one GPU that is partly in use; Ray tells the sum alone."""
    labels: Mapping[str, str] = field(default_factory=dict)
    accelerator_type: str = ""
    """Kind of its GPUs, as Ray names it; empty: none, or not known."""
    id: str = ""
    """Ray's id; empty: it is not a node of Ray yet."""
    used: Mapping[str, float] = field(default_factory=dict)
    """What others have of it, by Ray's names."""

    @classmethod
    def of(
        cls,
        name: str,
        resources: Mapping[str, float],
        labels: Mapping[str, str],
        id: str,
        total: Mapping[str, float],
    ) -> Node:
        """A node from what Ray says of it.

        Args:
            resources: what is free, by Ray's names.
            total: what it has in all.
        """
        kinds = [each for each in total if each.startswith(TYPE_RESOURCE)]
        kind = kinds[0].removeprefix(TYPE_RESOURCE) if kinds else ""
        free = {name: resources.get(name, 0.0) for name in ("CPU", "GPU")}
        used = {name: total.get(name, 0.0) - free[name] for name in free}
        taken = {name: round(each, 4) for name, each in used.items() if each > 1 / UNITS}
        return cls(name, free["CPU"], free["GPU"], labels, kind, id, taken)

    def __str__(self) -> str:
        return f"{self.name} ({amount(self.cpus, self.gpus)})"


@dataclass(frozen=True)
class Request:
    """What one worker asks of its node."""

    worker: str
    role: str
    cpus: int
    """In units, as the GPUs."""
    gpus: int
    labels: Mapping[str, str] = field(default_factory=dict)
    accelerator_type: str = ""

    def __str__(self) -> str:
        where = [self.accelerator_type] if self.accelerator_type else []
        where += [written(self.labels)] if self.labels else []
        needs = f"{self.cpus / UNITS:g} CPU, {self.gpus / UNITS:g} GPU"
        return f"{self.worker} ({', '.join([needs, *where])})"

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray reserves for it, by resource; empty if nothing."""
        found = {"CPU": self.cpus / UNITS, "GPU": self.gpus / UNITS}
        if self.accelerator_type:
            found[f"{TYPE_RESOURCE}{self.accelerator_type}"] = TYPE_SHARE
        return {name: amount for name, amount in found.items() if amount}

    def excludes(self, node: Node) -> str:
        """Why a node is none for this worker, whatever is free of it; empty if it is one."""
        if self.accelerator_type and self.accelerator_type != node.accelerator_type:
            found = node.accelerator_type or "no known accelerator"
            return f"has {found}, needed is {self.accelerator_type}"
        if part := unmet(self.labels, node.labels):
            key = part.partition("=")[0]
            found = f"{key}={node.labels[key]}" if key in node.labels else f"no label {key}"
            return f"has {found}, needed is {part}"
        return ""


@dataclass(frozen=True)
class Seat:
    """Where one worker fits."""

    worker: str
    node: str
    gpus: tuple[int, ...] = ()
    """Numbers of the GPUs on the node."""
    num_gpus: float = 0.0
    node_id: str = ""

    def __str__(self) -> str:
        if not self.gpus:
            return self.worker
        part = f"{self.num_gpus:g} of " if self.num_gpus < 1 else ""
        return f"{self.worker} ({part}GPU {', '.join(map(str, self.gpus))})"


class Room:
    """What is left of a node, in units."""

    def __init__(self, node: Node) -> None:
        whole, part = divmod(round(node.gpus * UNITS), UNITS)
        self.node, self.cpus = node, round(node.cpus * UNITS)
        self.gpus = [UNITS] * whole + [part] * (part > 0)
        self.seats: list[tuple[Request, Seat]] = []
        self._all = self.cpus, sum(self.gpus)
        self._roles = Counter[str]()

    def chosen(self, request: Request) -> list[int] | None:
        """The GPUs that Ray would give the worker; None: it does not fit."""
        return choose_gpus(self.gpus, request.gpus) if request.cpus <= self.cpus else None

    def take(self, request: Request, gpus: Sequence[int]) -> Seat:
        self.cpus -= request.cpus
        for gpu in gpus:
            self.gpus[gpu] -= min(request.gpus, UNITS)
        node = self.node
        seat = Seat(request.worker, node.name, tuple(gpus), request.gpus / UNITS, node.id)
        self.seats.append((request, seat))
        self._roles[request.role] += 1
        return seat

    def give(self) -> None:
        """Take the last worker out again."""
        request, seat = self.seats.pop()
        self.cpus += request.cpus
        self._roles[request.role] -= 1
        for gpu in seat.gpus:
            self.gpus[gpu] += min(request.gpus, UNITS)

    def of_role(self, role: str) -> int:
        return self._roles[role]

    @property
    def in_use(self) -> float:
        """Share of the CPUs or of the GPUs, whichever is larger."""
        return share_in_use((self.cpus, sum(self.gpus)), self._all)

    @property
    def left(self) -> str:
        return amount(self.cpus / UNITS, sum(self.gpus) / UNITS)


def share_in_use(left: Sequence[int], whole: Sequence[int]) -> float:
    """Share of the CPUs or of the GPUs of a node that is in use, whichever is larger; 1 if it has
    neither."""
    return max((1 - now / all for now, all in zip(left, whole) if all), default=1.0)


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


def amount(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPU{'s' * (cpus != 1)}, {gpus:g} GPU{'s' * (gpus != 1)}"
