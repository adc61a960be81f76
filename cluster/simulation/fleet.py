"""A fleet on a simulated cluster: `RayFleet` itself, on a virtual clock."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from cluster import clock
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session import backend
from cluster.roles import FleetPlan
from cluster.simulation.backend import SimulatedBackend
from cluster.simulation.behaviours import Factory, behaviours_of
from cluster.simulation.engine import Engine
from cluster.simulation.specification import Failure, SimulatedCluster


@dataclass(frozen=True)
class SimulatedFleet:
    """A fleet, and what it runs on."""

    fleet: RayFleet
    backend: SimulatedBackend

    def compute(self, seconds: float) -> None:
        """The driver computes so long."""
        self.backend.compute(seconds)

    def utilisation(self) -> dict[str, float]:
        """Role -> share of the time in which its workers worked, while they could, [0, 1]."""
        busy, served = dict[str, float](), dict[str, float]()
        for actor in self.backend.actors:
            busy[actor.role] = busy.get(actor.role, 0.0) + actor.busy_s
            served[actor.role] = served.get(actor.role, 0.0) + actor.served_s
        return {role: busy[role] / served[role] if served[role] else 0.0 for role in busy}


@contextmanager
def simulated_fleet(
    plan: FleetPlan,
    cluster: SimulatedCluster,
    factories: Mapping[str, Factory],
    *,
    failures: tuple[Failure, ...] = (),
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[SimulatedFleet]:
    """A fleet that has started, until the end of the block. The time of the process is virtual
    within it, and nothing of Ray starts.

    Args:
        factories: role -> (role, name of a worker) -> what it does.

    Raises:
        ConfigError: the fleet does not fit the hosts.
    """
    engine = Engine()
    simulated = SimulatedBackend(cluster, engine, behaviours_of(plan, factories), failures)
    with ExitStack() as stack:
        stack.enter_context(clock.using(engine))
        stack.enter_context(backend.using(simulated))
        stack.enter_context(_no_collections())
        simulated.leave()
        fleet = stack.enter_context(RayFleet(plan, simulated, should_stop))
        yield SimulatedFleet(fleet, simulated)


@contextmanager
def _no_collections() -> Iterator[None]:
    """Turn the garbage collector off: it would count the objects of the simulation as the
    driver's, and there are no cycles to speak of."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
