"""The search for an arrangement: which node, and which of its GPUs, for every worker.

First in the order in which workers start, each on the node that its role prefers; then with the
largest first; then every arrangement, within a bound, where alike nodes and alike workers count
once. What the last one refuses does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.placement.nodes import UNITS, Node, Request, Room, Seat

SPREAD = 0.5  # share in use from which Ray prefers another node
MOST_STATES, MOST_GANGS = 20_000, 300  # of the last search, which recurs once a gang
Preference = Literal["pack", "spread", "any"]
Gang = tuple[Request, ...]
"""Workers that must be on one node."""


@dataclass(frozen=True)
class Unseated:
    """No arrangement was found."""

    gang: Gang
    """The first workers without a node, ..."""
    rooms: Sequence[Room]
    """... and the nodes with the others on them."""
    certain: bool
    """There is none; False: the search was given up."""


def arrange(
    gangs: Sequence[Gang],
    nodes: Sequence[Node],
    preferences: Mapping[str, Preference],
    *,
    every: bool = True,
) -> list[Seat] | Unseated:
    """Seats of all workers, in the order of the gangs.

    Args:
        preferences: role -> how its workers are spread; any: as Ray would place them.
        every: search all arrangements where the quick ways find none.
    """
    prefer = _preferring(preferences)
    found = _in_turn(gangs, nodes, prefer)
    if isinstance(found, Unseated):
        hardest = sorted(gangs, key=_size)
        for way in (prefer, _fullest):
            found = _in_turn(hardest, nodes, way)
            if not isinstance(found, Unseated):
                break
        else:
            if every:
                rest, certain = _Search(hardest, nodes).run()
                # what the quick way has seated says more to a reader
                found = rest or Unseated(found.gang, found.rooms, certain)
    return found if isinstance(found, Unseated) else _in_order(gangs, found)


def _size(gang: Gang) -> tuple[int, ...]:
    """Order of the search: what excludes nodes first, then the largest."""
    bound = sum(bool(each.labels or each.accelerator_type) for each in gang)
    largest = max(each.gpus for each in gang)
    return (-bool(bound), -largest, -sum(each.gpus for each in gang), -sum(e.cpus for e in gang))


def _in_order(gangs: Sequence[Gang], seats: Sequence[Seat]) -> list[Seat]:
    named = {seat.worker: seat for seat in seats}
    return [named[request.worker] for gang in gangs for request in gang]


Way = Callable[[Room, Gang], tuple[float, ...]]
"""Preference of a node for a gang, lowest first."""


def _preferring(preferences: Mapping[str, Preference]) -> Way:
    def prefer(room: Room, gang: Gang) -> tuple[float, ...]:
        first = gang[0]
        way = preferences.get(first.role, "any")
        others = room.of_role(first.role) if way != "any" else 0
        kept = _kept_free(room, gang)
        if way == "pack":
            return kept, -others, -sum(room.gpus), -room.cpus
        if way == "spread":
            return others, kept, room.in_use
        return kept, order_of_ray(room.in_use)

    return prefer


def order_of_ray(in_use: float) -> float:
    """Preference of a node by Ray's default, lowest first: nodes in use up to `SPREAD` in order,
    then the least used."""
    return in_use if in_use >= SPREAD else 0.0


def _fullest(room: Room, gang: Gang) -> tuple[float, ...]:
    return _kept_free(room, gang), sum(room.gpus), room.cpus


def _kept_free(room: Room, gang: Gang) -> bool:
    """Nodes with GPUs are left to workers with GPUs."""
    return bool(room.gpus) and not any(each.gpus for each in gang)


def _in_turn(gangs: Sequence[Gang], nodes: Sequence[Node], way: Way) -> list[Seat] | Unseated:
    """Gangs one after another, each on the node that is preferred."""
    rooms, seats = [Room(node) for node in nodes], list[Seat]()
    allowed = _Allowed(rooms)
    for gang in gangs:
        holding = (room for room in allowed(gang) if room.chosen(gang[0]) is not None)
        ranked = sorted(holding, key=lambda room: way(room, gang))
        for room in ranked:
            if (taken := _seated(room, gang)) is not None:
                seats += taken
                break
        else:
            return Unseated(gang, rooms, certain=False)
    return seats


def _seated(room: Room, gang: Gang) -> list[Seat] | None:
    """Take the workers of a gang as Ray would, or none of them."""
    seats: list[Seat] = []
    for request in gang:
        gpus = room.chosen(request)
        if gpus is None:
            for _ in seats:
                room.give()
            return None
        seats.append(room.take(request, gpus))
    return seats


class _Allowed:
    """The nodes that labels and accelerator types leave to a gang."""

    def __init__(self, rooms: Sequence[Room]) -> None:
        self._rooms, self._known = rooms, dict[object, list[Room]]()

    def __call__(self, gang: Gang) -> list[Room]:
        key = tuple((each.accelerator_type, *sorted(each.labels.items())) for each in gang)
        if key not in self._known:
            fit = (r for r in self._rooms if not any(each.excludes(r.node) for each in gang))
            self._known[key] = list(fit)
        return self._known[key]


class _Search:
    """All arrangements, depth first. A state (what is left of each node) that has failed once for
    the gangs that remain is not searched again."""

    def __init__(self, gangs: Sequence[Gang], nodes: Sequence[Node]) -> None:
        self._gangs, self._rooms = gangs, [Room(node) for node in nodes]
        self._allowed, self._failed = _Allowed(self._rooms), set[object]()
        every = [{id(room) for room in self._allowed(gang)} for gang in gangs]
        # nodes are alike if the same gangs may run on them
        self._kinds = [tuple(id(room) in fit for fit in every) for room in self._rooms]
        self._kind = {id(room): kind for room, kind in zip(self._rooms, self._kinds)}

    def run(self) -> tuple[list[Seat], bool]:
        """Seats, none if no arrangement was found; whether that is certain."""
        if len(self._gangs) > MOST_GANGS:
            return [], False
        try:
            found = self._seat(0)
        except _GivenUpError:
            return [], False
        return [seat for room in self._rooms for _, seat in room.seats] if found else [], True

    def _seat(self, at: int) -> bool:
        if at == len(self._gangs):
            return True
        state = at, tuple(sorted(map(self._key, self._rooms)))
        if state in self._failed:
            return False
        if len(self._failed) >= MOST_STATES:
            raise _GivenUpError
        tried = set[object]()
        for room in self._allowed(self._gangs[at]):
            if (key := self._key(room)) not in tried:
                tried.add(key)
                for _ in self._ways(room, self._gangs[at]):
                    if self._seat(at + 1):
                        return True
        self._failed.add(state)
        return False

    def _key(self, room: Room) -> tuple[object, ...]:
        return self._kind[id(room)], room.cpus, tuple(sorted(room.gpus))

    def _ways(self, room: Room, gang: Gang) -> Iterator[None]:
        """Every way in which a gang's workers share the GPUs of a node. They have their seats while
        the caller looks at it, and keep them if it looks no further."""
        if not gang:
            yield
            return
        for gpus in _choices(room, gang[0]):
            room.take(gang[0], gpus)
            yield from self._ways(room, gang[1:])
            room.give()


def _choices(room: Room, request: Request) -> list[list[int]]:
    if request.cpus > room.cpus:
        return []
    if not request.gpus or request.gpus >= UNITS:
        chosen = room.chosen(request)
        return [] if chosen is None else [chosen]
    different = {left: number for number, left in enumerate(room.gpus) if left >= request.gpus}
    return [[different[left]] for left in sorted(different)]


class _GivenUpError(Exception):
    """Too many states."""
