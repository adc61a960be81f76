"""Starts the actors of a fleet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.io.paths import in_ray_package
from cluster.placement.nodes import UNITS, Node, Request, Seat
from cluster.program.gpu_memory import limited_to_share
from cluster.program.invocation import current
from cluster.program.orphans import ending_with_parent
from cluster.program.secrets import secret_variables, with_environment
from cluster.program.signals import ignoring_signals
from cluster.ray_backend import heartbeat
from cluster.ray_backend.placement_groups import PlacementGroups, emptiest, no_room, too_late
from cluster.ray_session import backend
from cluster.ray_session.backend import Nodes
from cluster.ray_session.node_autoscaler import place_with_autoscaler
from cluster.ray_session.private import started
from cluster.roles import FleetPlan, Role
from cluster.scheduling.placement import FleetPlacement, quota_of, request_of
from cluster.scheduling.pool import Worker

logger = logging.getLogger(__name__)


def actor_class(factory: Callable[..., Any], groups: Mapping[str, int]) -> Any:
    """Ray's actor class of a role.

    Args:
        groups: concurrency group -> number of threads.
    """
    options: dict[str, Any] = {"concurrency_groups": dict(groups)}
    return backend.actor_class(factory, options)


WrapClass = Callable[..., Any]
"""(class, concurrency groups) -> Ray's actor class."""


@dataclass(frozen=True)
class _Reservation:
    """What one worker reserves."""

    cpus: float
    options: Mapping[str, Any]
    """Of its actor: its placement group, or labels of its node."""
    waits_for: str = ""
    """Why no node has room for it now; empty if one has."""


class Launcher:
    """Starts workers where the plan places them.

    Args:
        plan: has the roles; what they reserve is settled now.
    """

    def __init__(self, plan: FleetPlan, session: Nodes) -> None:
        self._session = session
        # A cluster that was joined starts its workers where `ray start` was called: relative paths
        # would lead elsewhere than here. Those of a job have its package on every node.
        here = Path.cwd()
        self._directory = str(here) if session.joined and not in_ray_package(here) else ""
        self._plan = plan
        # A Ray of the run's own has one node and no other users: it needs no placement groups.
        self._groups = PlacementGroups() if session.joined else None
        placement = place_with_autoscaler(plan, session)
        if placement.note:
            logger.warning("note: %s", placement.note)
        self.placements = {p.role: p for p in placement.roles}
        self.quota = quota_of(plan, placement.roles)
        self._reserve(placement)

    def _reserve(self, placement: FleetPlacement) -> None:
        """
        Raises:
            NoRoomError: Ray does not place the workers in time.
        """
        if self._groups is None:
            return
        wait_s = self._plan.placement.wait_s
        try:
            self._groups.reserve(placement.gangs, placement.seats)
            if late := self._groups.wait(wait_s):
                raise too_late(late, self._session.nodes, wait_s)
        except BaseException:
            self._groups.end()
            raise

    def keep(self, workers: Collection[str]) -> None:
        """Free what workers had reserved that are gone for good.

        Args:
            workers: names of all others.
        """
        if self._groups is not None:
            self._groups.keep(workers)

    def end(self) -> None:
        """Free all reservations."""
        if self._groups is not None:
            self._groups.end()

    def __call__(
        self,
        role: Role,
        index: int,
        wrap: WrapClass,
        threads: Mapping[str, int],
        *,
        addition: bool = False,
        late: bool = False,
    ) -> Worker:
        """Start one worker, without waiting for it.

        Args:
            threads: of concurrency groups, beside the one that answers in order.
            addition: beyond what the run began with.
            late: the run cannot go on without it, and what its predecessor had reserved may be gone
                with its machine: an equal share of the CPUs is then not waited for.
        """
        placement = self.placements[role.name]
        request = request_of(role, index, placement.num_cpus)
        reservation = self._reserved(request, role, addition=addition, late=late)
        options: dict[str, Any] = {
            "num_cpus": reservation.cpus,
            "num_gpus": placement.num_gpus,
            **reservation.options,
        }
        if role.concurrency > 1:
            options["max_concurrency"] = role.concurrency
        environment, secrets = secret_variables(role.runtime_env or {})
        if environment:
            options["runtime_env"] = environment
        variables = {**role.environment, **secrets}
        limited = limited_to_share(role.factory, placement.num_gpus)
        equipped = with_environment(limited, variables, current(), self._directory)
        factory = ending_with_parent(ignoring_signals(equipped))
        actor = wrap(factory, {heartbeat.GROUP: 1, **threads}).options(**options)
        handle = actor.remote(role.config, name=role.worker_name(index))
        if reservation.waits_for:
            logger.warning("%s waits for room: %s", request.worker, reservation.waits_for)
        return Worker(
            role, index, handle, started(handle), addition, waits_for=reservation.waits_for
        )

    def _reserved(
        self, request: Request, role: Role, *, addition: bool, late: bool
    ) -> _Reservation:
        """Where a worker runs: in the reservation of its predecessor, in a new one, or, with an
        equal share of the CPUs that no node has left, beside the others of any node."""
        name, groups, shares = request.worker, self._groups, not role.resources.num_cpus
        held = groups.request(name) if groups is not None else None
        if groups is not None and held is not None:
            placed = groups.placed(name)
            if placed or not (late and shares and groups.alone(name)):
                waits = "" if placed else no_room(held, self._session.nodes)
                return _Reservation(held.cpus / UNITS, groups.options(name), waits)
            groups.remove(name)  # of a node that is gone
        if shares and (late or (addition and self._session.free_cpus < request.cpus / UNITS)):
            # its share was of what others have reserved by now; it takes turns with them
            request = replace(request, cpus=0)
        cpus = request.cpus / UNITS
        if groups is None:
            return _Reservation(cpus, {})
        nodes = self._session.nodes
        groups.reserve([(request,)], [_seat(request, role, nodes, self._plan, groups)])
        options = groups.options(name)
        if not options:  # it reserves nothing
            options = {"label_selector": dict(request.labels)} if request.labels else {}
        return _Reservation(cpus, options, no_room(request, nodes))


def _seat(
    request: Request,
    role: Role,
    nodes: Sequence[Node],
    plan: FleetPlan,
    groups: PlacementGroups,
) -> Seat:
    """The node that an added or replaced worker had best get."""
    spread = role in plan.servers and plan.placement.reward_servers == "spread"
    others = groups.nodes_of(role.name) if spread else []
    return Seat(request.worker, "", node_id=emptiest(request, nodes, others))
