"""Ray's calls, answered by a simulated cluster."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from ray.exceptions import GetTimeoutError

from cluster.errors import FleetError
from cluster.placement.nodes import UNITS, Node
from cluster.simulation.actors import INSIDE, Actor, Behaviour, Call, State
from cluster.simulation.engine import Engine
from cluster.simulation.links import Links
from cluster.simulation.machines import Machine, Seat, seat_anywhere
from cluster.simulation.references import DRIVER, ObjectStore, Reference
from cluster.simulation.specification import Failure, Fault, SimulatedCluster

SAMPLE = "sample"
"""The call by which a group begins: its first argument is a list of requests."""


class SimulatedBackend:
    """A `cluster.ray_session.backend.Backend`, and what `Launcher` asks of a `RaySession`.

    Args:
        behaviour: name of a worker -> what it does.
    """

    joined = False

    def __init__(
        self,
        cluster: SimulatedCluster,
        engine: Engine,
        behaviour: Callable[[str], Behaviour],
        failures: tuple[Failure, ...] = (),
    ) -> None:
        self.cluster, self.engine, self._behaviour = cluster, engine, behaviour
        count = len(cluster.hosts)
        self.links = Links(engine, count, cluster.link_bytes_per_s, cluster.latency_s)
        self._fresh: list[Reference] = []
        self.store = ObjectStore(self.links, count, self._fresh.append)
        self.machines = [Machine(i, engine, host) for i, host in enumerate(cluster.hosts)]
        self.actors: list[Actor] = []
        """Of the whole run, in the order in which they were started."""
        self._waiting: deque[Actor] = deque()
        self._slow: dict[str, float] = {}
        self.driver_s = 0.0
        """CPU seconds of the driver."""
        self._debt, self._left = 0.0, 0.0
        for failure in failures:
            engine.after(failure.at_s, partial(self._happen, failure))

    # what the fleet asks of a session

    @property
    def nodes(self) -> list[Node]:
        alive = (machine for machine in self.machines if machine.alive)
        return [Node(each.name, each.host.cpus, float(each.host.gpus)) for each in alive]

    @property
    def free_cpus(self) -> float:
        return sum(machine.cpus for machine in self.machines if machine.alive) / UNITS

    # what it asks of Ray

    def actor_class(self, factory: Callable[..., Any], options: dict[str, Any]) -> Any:
        return _ActorClass(self, options)

    def get(self, ref: Any, timeout_s: float | None = None) -> Any:
        self.enter(self.cluster.driver.get_s)
        if not self.store.is_at(ref, DRIVER) and not self._wait([ref], 1, timeout_s, True):
            self.leave()
            raise GetTimeoutError("the answer is not there")
        self.leave(self.cluster.driver.byte_s * ref.size)
        if ref.error is not None:
            raise ref.error
        return ref.value

    def wait(
        self, refs: list[Any], count: int, timeout_s: float | None, fetch_local: bool
    ) -> tuple[list[Any], list[Any]]:
        costs = self.cluster.driver
        self.enter(costs.wait_s + costs.wait_ref_s * len(refs))
        found = self._wait(refs, count, timeout_s, fetch_local)
        ready = [ref for ref in refs if ref in found][:count]
        taken = set(ready)
        rest = [ref for ref in refs if ref not in taken]
        self.leave()
        return ready, rest

    def put(self, value: Any) -> Any:
        self.enter(self.cluster.driver.remote_s)
        size, ref = nbytes(value), Reference(self.store)
        self.store.put(ref, value, size, DRIVER)
        self.leave(self.cluster.driver.byte_s * size)
        return ref

    def kill(self, handle: Any) -> None:
        self.enter()
        self._end(handle.actor, 0.0)
        self.leave()

    def nodes_of(self, handles: Sequence[Any]) -> list[str]:
        return [""] * len(handles)  # weights travel whole here, and are not passed on

    # the driver's own time

    def enter(self, seconds: float = 0.0) -> None:
        """The driver calls: count the CPU time that it took since it was answered."""
        if self.cluster.driver.measured:
            seconds += time.thread_time() - self._left
        self._debt += seconds

    def leave(self, seconds: float = 0.0) -> None:
        """The driver is answered."""
        self._debt += seconds
        if self.cluster.driver.measured:
            self._left = time.thread_time()

    def compute(self, seconds: float) -> None:
        """The driver computes."""
        self.enter(seconds)
        self._settle()
        self.leave()

    def _settle(self) -> None:
        """Let the time pass that the driver computed, on a core of its host."""
        debt, self._debt = self._debt, 0.0
        if debt > 0:
            self.driver_s += debt
            ended: list[bool] = []
            self.machines[DRIVER].cores.start(debt, 1.0, lambda: ended.append(True))
            self.engine.run(math.inf, lambda: bool(ended))

    def _wait(
        self, refs: list[Reference], count: int, timeout_s: float | None, local: bool
    ) -> set[Reference]:
        """The references that are ready, once there are `count`, or after some time."""
        self._settle()
        until = math.inf if timeout_s is None else self.engine.now + timeout_s
        wanted, found = set(refs), set[Reference]()

        def look(ref: Reference) -> None:
            if ref.hosts is None or ref in found:
                return
            if not local or self.store.is_at(ref, DRIVER):
                found.add(ref)
            elif DRIVER not in ref.pulls:
                self.store.pull(ref, DRIVER, lambda: None)

        def enough() -> bool:
            if self._fresh:
                fresh = [*self._fresh]
                self._fresh.clear()
                for ref in fresh:
                    if ref in wanted:
                        look(ref)
            return len(found) >= count

        self._fresh.clear()
        for ref in refs:
            look(ref)
        self.engine.run(until, enough)
        if math.isinf(self.engine.now):
            raise FleetError("the simulation stands still: the driver waits for what cannot happen")
        return found

    # actors

    def start(self, name: str, cpus: float, gpus: float) -> Handle:
        """Start an actor where there is room, now or later."""
        self.enter(self.cluster.driver.remote_s)
        seat = Seat(round(cpus * UNITS), round(gpus * UNITS))
        actor = Actor(name, self._behaviour(name), self.engine, self.store, seat)
        actor.slowness = self._slow.get(name, 1.0)
        self.actors.append(actor)
        self._waiting.append(actor)
        self._seat()
        self.leave()
        return Handle(self, actor)

    def call(
        self,
        actor: Actor,
        method: str,
        arguments: tuple[Any, ...],
        named: Mapping[str, Any],
        group: str,
        returns: int,
    ) -> Any:
        """Call an actor's method; returns a reference, or several."""
        costs = self.cluster.driver
        self.enter(costs.remote_s)
        size = nbytes(arguments)
        groups = len(arguments[0]) if method == SAMPLE else 0
        refs = tuple(Reference(self.store) for _ in range(returns))
        inside = method == INSIDE
        name = arguments[0].__name__ if inside else method
        call = Call(name, inside, group, arguments, named, refs, size)
        self.engine.after(self._debt + self.cluster.latency_s, lambda: actor.call(call))
        self.leave(costs.byte_s * size + costs.group_s * groups)
        return refs[0] if returns == 1 else refs

    def _seat(self) -> None:
        """Start processes of actors for which there is room, in order."""
        for actor in [*self._waiting]:
            if seat_anywhere(actor.seat, self.machines):
                self._waiting.remove(actor)
                actor.state = State.STARTING
                self.engine.after(self.cluster.start_s, actor.begin)

    def _end(self, actor: Actor, noticed_s: float) -> None:
        if actor.state is State.ENDED:
            return
        actor.end(noticed_s)
        if actor in self._waiting:
            self._waiting.remove(actor)
        machine = actor.seat.machine
        if machine is not None and machine.alive:
            machine.give(actor.seat)
            self._seat()

    def _happen(self, failure: Failure) -> None:
        if failure.fault is Fault.HOST_LOST:
            self._lose_host(self.machines[failure.host], failure.until_s)
            return
        now = [a for a in self.actors if a.name == failure.worker and a.state is not State.ENDED]
        for actor in now:
            if failure.fault is Fault.KILLED:
                self._end(actor, self.cluster.process_loss_s)
            elif failure.fault is Fault.HANGS:
                actor.hang()
        if failure.fault is Fault.SLOW:
            self._slow_down(failure.worker, failure.factor)
            if not math.isinf(failure.until_s):
                after = failure.until_s - failure.at_s
                self.engine.after(after, lambda: self._slow_down(failure.worker, 1.0))

    def _slow_down(self, worker: str, factor: float) -> None:
        self._slow[worker] = factor
        for actor in self.actors:
            if actor.name == worker:
                actor.slowness = factor

    def _lose_host(self, machine: Machine, until_s: float) -> None:
        if not machine.alive:
            return
        machine.alive = False
        for actor in self.actors:
            if actor.seat.machine is machine:
                actor.end(self.cluster.host_loss_s)
        self.store.lose(machine.number)
        if not math.isinf(until_s):
            self.engine.after(until_s - self.engine.now, lambda: self._bring_back(machine))

    def _bring_back(self, machine: Machine) -> None:
        machine.alive = True
        machine.clear()
        self._seat()


class _ActorClass:
    """Like Ray's: `options(...)` says what an actor reserves, `remote(...)` starts it."""

    def __init__(self, backend: SimulatedBackend, options: Mapping[str, Any]) -> None:
        self._backend, self._options = backend, options

    def options(self, **options: Any) -> _ActorClass:
        return _ActorClass(self._backend, {**self._options, **options})

    def remote(self, config: Any, *, name: str) -> Handle:
        asked = self._options
        return self._backend.start(name, asked.get("num_cpus", 0), asked.get("num_gpus", 0))


class Handle:
    """Like an actor handle of Ray: its methods are those of the worker."""

    def __init__(self, backend: SimulatedBackend, actor: Actor) -> None:
        self.backend, self.actor = backend, actor

    def __getattr__(self, name: str) -> Method:
        if name.startswith("_") and not name.startswith("__ray_"):
            raise AttributeError(name)
        return Method(self, name)


@dataclass(frozen=True)
class Method:
    """A method of a handle."""

    handle: Handle
    name: str
    group: str = ""
    returns: int = 1

    def options(self, *, num_returns: int = 1, concurrency_group: str = "") -> Method:
        return replace(self, returns=num_returns, group=concurrency_group)

    def remote(self, *arguments: Any, **named: Any) -> Any:
        handle = self.handle
        return handle.backend.call(
            handle.actor, self.name, arguments, named, self.group, self.returns
        )


def nbytes(value: Any) -> float:
    """Bytes of the arrays in a value."""
    kind = type(value)
    if kind is np.ndarray or kind is bytes:
        return float(len(value) if kind is bytes else value.nbytes)
    if kind is list or kind is tuple:
        return sum(map(nbytes, value))
    names = _fields.get(kind)
    if names is None:
        names = tuple(item.name for item in fields(kind)) if is_dataclass(kind) else ()
        _fields[kind] = names
    return sum([nbytes(getattr(value, name)) for name in names])


_fields: dict[type, tuple[str, ...]] = {}  # of each dataclass
