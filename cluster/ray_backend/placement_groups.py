"""Placement groups: what the workers of a fleet reserve, and where.

A group is on one node. Most hold one worker; with `samplers_with_reward_servers` a sampler and its
reward server share one. So a lost node takes whole groups, Ray places each of them again as soon as
it finds room, and the others are as they were. A replacement runs in the reservation of its
predecessor. Ray removes the groups of a driver that dies.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster import clock
from cluster.placement.nodes import Node, Request, Room, Seat
from cluster.placement.refusal import NoRoomError, excluded, explain
from cluster.placement.seating import Gang, Unseated, arrange
from cluster.ray_session.private import place_on_one_node

logger = logging.getLogger(__name__)

SLICE_S = 1.0  # of waiting, so that a signal is noticed


@dataclass
class _Group:
    gang: Gang
    handle: Any


class PlacementGroups:
    """The groups of a fleet, by the names of their workers."""

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}

    def reserve(self, gangs: Sequence[Gang], seats: Sequence[Seat]) -> None:
        """Ask for the groups of some gangs, each on the node of its seats if that has room still.

        Args:
            seats: of all workers of the gangs, in order; of none: wherever there is room.
        """
        nodes = {seat.worker: seat.node_id for seat in seats}
        for gang in gangs:
            bundles = [request.bundle for request in gang]
            if not all(bundles):
                continue  # it reserves nothing, and needs no group
            handle = place_on_one_node(
                bundles, [dict(request.labels) for request in gang], nodes.get(gang[0].worker, "")
            )
            for request in gang:
                self._groups[request.worker] = _Group(gang, handle)

    def wait(self, wait_s: float) -> list[Gang]:
        """Wait until all groups are placed; returns those that are not."""
        deadline = clock.monotonic() + wait_s
        pending = self._each()
        while pending and (left := deadline - clock.monotonic()) > 0:
            if pending[0].handle.wait(min(left, SLICE_S)):
                del pending[0]
        return [group.gang for group in pending if not group.handle.wait(0)]

    def options(self, worker: str) -> dict[str, Any]:
        """Options of the actor of a worker; none, if it has no group."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = self._groups.get(worker)
        if group is None:
            return {}
        index = [request.worker for request in group.gang].index(worker)
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group.handle, index)}

    def request(self, worker: str) -> Request | None:
        """What a worker has reserved."""
        group = self._groups.get(worker)
        found = () if group is None else group.gang
        return next((request for request in found if request.worker == worker), None)

    def placed(self, worker: str) -> bool:
        """Whether a worker has a group, and Ray knows of no loss of its node."""
        from ray.util import placement_group_table

        group = self._groups.get(worker)
        return group is not None and placement_group_table(group.handle).get("state") == "CREATED"

    def alone(self, worker: str) -> bool:
        group = self._groups.get(worker)
        return group is not None and len(group.gang) == 1

    def nodes_of(self, role: str) -> list[str]:
        """The node's id of each worker of a role that has a group and a place."""
        from ray.util import placement_group_table

        table: Mapping[str, Any] = placement_group_table()
        found = []
        for group in self._each():
            entry = table.get(group.handle.id.hex(), {})
            node = entry.get("bundles_to_node_id", {}).get(0, "")
            found += [node for request in group.gang if node and request.role == role]
        return found

    def _each(self) -> list[_Group]:
        """Every group once, however many workers share it."""
        return list({id(group.handle): group for group in self._groups.values()}.values())

    def keep(self, workers: Collection[str]) -> None:
        """Remove the groups of which no worker is left."""
        for name in [name for name in self._groups if name not in workers]:
            group = self._groups[name]
            if not any(request.worker in workers for request in group.gang):
                self.remove(name)

    def remove(self, worker: str) -> None:
        """Remove a worker's group; what runs in it ends."""
        from ray.util import remove_placement_group

        group = self._groups.get(worker)
        if group is not None:
            remove_placement_group(group.handle)
            for request in group.gang:
                self._groups.pop(request.worker, None)

    def end(self) -> None:
        """Remove all groups."""
        for name in list(self._groups):
            self.remove(name)


def no_room(request: Request, nodes: Sequence[Node]) -> str:
    """Why no node has room for a worker at the moment; empty if one has."""
    found = arrange([(request,)], nodes, {})
    return explain(found) if isinstance(found, Unseated) else ""


def emptiest(request: Request, nodes: Sequence[Node], taken: Sequence[str]) -> str:
    """Id of the node with room for a worker, and the fewest others of its role; empty if there is
    none.

    Args:
        taken: ids of the nodes of the others.
    """
    fit = [
        node
        for node in nodes
        if not excluded(node, (request,)) and Room(node).chosen(request) is not None
    ]
    left = not request.gpus  # nodes with GPUs are left to workers with GPUs
    fit.sort(
        key=lambda node: (left and bool(node.gpus), taken.count(node.id), -node.gpus, -node.cpus)
    )
    return fit[0].id if fit else ""


def too_late(gangs: Sequence[Gang], nodes: Sequence[Node], wait_s: float) -> NoRoomError:
    """The error for groups that Ray did not place, although their nodes had room before.

    Args:
        nodes: with what is free now.
    """
    found = arrange(gangs, nodes, {})
    if isinstance(found, Unseated):
        why = explain(found)
    else:
        names = ", ".join(request.worker for gang in gangs for request in gang)
        why = f"Ray did not place {names}, although these nodes have room"
        why = "\n".join([why, *(f"  {node}" for node in nodes)])
    return NoRoomError(
        f"the fleet was not placed within {wait_s:g} s (--placement.wait-s): others took its room "
        f"meanwhile. Now {why}\nwait for their end, ask for fewer workers, or start more nodes"
    )
