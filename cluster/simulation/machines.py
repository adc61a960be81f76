"""Machines, what workers reserve of them, and their processors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.placement.nodes import UNITS, choose_gpus, share_in_use
from cluster.placement.seating import order_of_ray
from cluster.simulation.engine import Engine
from cluster.simulation.processors import Processor
from cluster.simulation.specification import Host


@dataclass(eq=False)
class Seat:
    """What a worker reserves, and where it sits."""

    cpus: int
    """In units, as `gpus`."""
    gpus: int
    machine: Machine | None = None
    """None: it waits for room."""
    numbers: Sequence[int] = ()
    """Of its GPUs."""


@dataclass(eq=False)
class Machine:
    """A host and what is free of it, in units."""

    number: int
    engine: Engine
    host: Host
    alive: bool = True
    cpus: int = field(init=False)
    gpus: list[int] = field(init=False)
    cores: Processor = field(init=False)
    on_gpus: list[Processor] = field(init=False)

    def __post_init__(self) -> None:
        self.cores = Processor(self.engine, self.host.cpus)
        self.on_gpus = [Processor(self.engine, 1.0) for _ in range(self.host.gpus)]
        self.clear()

    @property
    def name(self) -> str:
        return f"host-{self.number}"

    def clear(self) -> None:
        """Nothing is reserved."""
        self.cpus, self.gpus = round(self.host.cpus * UNITS), [UNITS] * self.host.gpus

    @property
    def free_gpus(self) -> float:
        return sum(self.gpus) / UNITS

    @property
    def in_use(self) -> float:
        """Share of CPUs or GPUs that is reserved, whichever is larger."""
        whole = round(self.host.cpus * UNITS), self.host.gpus * UNITS
        return share_in_use((self.cpus, sum(self.gpus)), whole)

    def take(self, seat: Seat) -> bool:
        """Seat a worker, if there is room."""
        numbers = choose_gpus(self.gpus, seat.gpus) if seat.cpus <= self.cpus else None
        if numbers is None or not self.alive:
            return False
        self.cpus -= seat.cpus
        for number in numbers:
            self.gpus[number] -= min(seat.gpus, UNITS)
        seat.machine, seat.numbers = self, numbers
        return True

    def give(self, seat: Seat) -> None:
        """Free a worker's seat."""
        self.cpus += seat.cpus
        for number in seat.numbers:
            self.gpus[number] += min(seat.gpus, UNITS)

    def processor(self, seat: Seat) -> Processor:
        """What its worker computes on: its first GPU, or the cores."""
        return self.on_gpus[seat.numbers[0]] if seat.numbers else self.cores


def seat_anywhere(seat: Seat, machines: Sequence[Machine]) -> bool:
    """Seat a worker where Ray would: not on a host with GPUs if it needs none, then on the first
    that is less than half in use, then on the least used."""

    def preference(machine: Machine) -> tuple[bool, float]:
        return not seat.gpus and bool(machine.gpus), order_of_ray(machine.in_use)

    return any(machine.take(seat) for machine in sorted(machines, key=preference))
