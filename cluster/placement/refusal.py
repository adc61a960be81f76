"""What is said of workers that do not fit: needed and available, by node."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.errors import ConfigError
from cluster.placement.nodes import UNITS, Node, Room
from cluster.placement.seating import Gang, Unseated

SHOWN = 8  # nodes or workers that a message names


class NoRoomError(ConfigError):
    """The workers do not fit the nodes. With more nodes they might."""


def explain(without: Unseated) -> str:
    """Why some workers have no node, with the reason of each node, one a line."""
    who = " together with ".join(map(str, without.gang))
    found = "no node has room" if without.certain else "no arrangement was found with room"
    lines = [f"{found} for {who}", *(f"  {_why(room, without.gang)}" for room in without.rooms)]
    if len(without.rooms) > SHOWN:
        lines[SHOWN + 1 :] = [f"  and {len(without.rooms) - SHOWN} more nodes"]
    return "\n".join(lines)


def _why(room: Room, gang: Gang) -> str:
    if reason := excluded(room.node, gang):
        return f"{room.node}: {reason}"
    others = listed([seat for _, seat in room.seats])
    short = f"{room.left} left beside {others}" if others else _shortage(room, gang)
    return f"{room.node}: {short}"


def _shortage(room: Room, gang: Gang) -> str:
    """What an empty node lacks."""
    if sum(each.cpus for each in gang) > room.cpus:
        return "too few CPUs"
    if (least := max(each.gpus for each in gang)) < UNITS:
        return f"no GPU has {least / UNITS:g} free"
    return "too few unused GPUs"


def excluded(node: Node, gang: Gang) -> str:
    """Why labels and accelerator types exclude a node; empty if they do not."""
    return next((reason for each in gang if (reason := each.excludes(node))), "")


def listed(items: Sequence[object]) -> str:
    return ", ".join([*map(str, items[:SHOWN]), *["..."] * (len(items) > SHOWN)])
