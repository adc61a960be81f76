"""Slots that bound how old rollouts can become, and how many are on their way. Pure.

There are (S + 1) P slots for iterations of P groups each. An iteration takes P slots when it is
asked for, and gives them back only when the weights that were learned from it are live. So
iteration n is asked for when those of iteration n - S - 1 are, and is drawn with n - S updates at
least: its staleness is at most S by construction. It is checked again where it is consumed.

    admit --> complete (each group, in any order) --> take --> release

Groups may come in any order, and again from a second worker if the first one was thought lost; what
`take` gives is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from cluster.errors import FleetError

G = TypeVar("G")


@dataclass
class _Held(Generic[G]):
    """One iteration's slots."""

    version: int
    groups: dict[int, G] = field(default_factory=dict)
    taken: bool = False


class GroupBuffer(Generic[G]):
    """See the module.

    Args:
        groups: P, of an iteration.
        max_staleness: S; 0 is on-policy.
        first: iteration that learning begins with; as many updates are live.
    """

    def __init__(self, groups: int, max_staleness: int, first: int = 0) -> None:
        if groups < 1 or max_staleness < 0 or first < 0:
            raise ValueError(
                "groups must be >= 1, max_staleness and first >= 0; found "
                f"{groups}, {max_staleness} and {first}"
            )
        self.groups, self.max_staleness = groups, max_staleness
        self.live = first
        """Updates behind the weights that requests are answered with now."""
        self._next = first
        self._held: dict[int, _Held[G]] = {}

    @property
    def capacity(self) -> int:
        """Slots."""
        return (self.max_staleness + 1) * self.groups

    @property
    def used(self) -> int:
        """Slots that are not free."""
        return len(self._held) * self.groups

    @property
    def next(self) -> int:
        """The iteration that is admitted next."""
        return self._next

    @property
    def has_room(self) -> bool:
        """Whether a whole iteration fits."""
        return self.used + self.groups <= self.capacity

    def version(self, iteration: int) -> int:
        """How many updates are behind the weights that an iteration is drawn with."""
        return self._find(iteration).version

    def admit(self, version: int | None = None) -> int:
        """Take slots for the next iteration; returns which it is.

        Args:
            version: updates behind the weights it is drawn with; None: those that are live. Older
                ones are of an iteration that was asked for before a run was interrupted.

        Raises:
            FleetError: there is no room, or such weights would be too old, or are not there yet.
        """
        iteration, drawn = self._next, self.live if version is None else version
        if not self.has_room:
            raise FleetError(
                f"iteration {iteration} was asked for while {self.used} of {self.capacity} slots "
                "are taken: release an iteration first"
            )
        if not iteration - self.max_staleness <= drawn <= self.live:
            raise FleetError(
                f"iteration {iteration} cannot be drawn with the weights of {drawn} updates: "
                f"max_staleness {self.max_staleness} allows {iteration - self.max_staleness} to "
                f"{self.live}"
            )
        self._held[iteration] = _Held(drawn)
        self._next += 1
        return iteration

    def complete(self, iteration: int, group: int, content: G) -> bool:
        """Put a finished group in its slot; False if it was there already, and stays.

        Raises:
            FleetError: nobody asked for it, or its iteration was consumed.
        """
        held = self._find(iteration)
        if held.taken or not 0 <= group < self.groups:
            what = "was consumed already" if held.taken else f"has {self.groups} groups"
            raise FleetError(f"group {group} of iteration {iteration} came, but that {what}")
        if group in held.groups:
            return False
        held.groups[group] = content
        return True

    def missing(self, iteration: int) -> list[int]:
        """Groups of an iteration that are not there yet."""
        held = self._find(iteration)
        return [group for group in range(self.groups) if group not in held.groups]

    def content(self, iteration: int) -> list[G]:
        """Groups of an iteration that are there, in order; they stay."""
        held = self._find(iteration)
        return [held.groups[group] for group in sorted(held.groups)]

    def take(self, iteration: int) -> list[G]:
        """The groups of the oldest iteration, in order, to be learned from: once.

        Raises:
            FleetError: not the oldest, not complete, consumed already, or too stale.
        """
        held = self._find(iteration)
        if held.taken or iteration != min(self._held):
            raise FleetError(
                f"iteration {iteration} cannot be consumed: it was already, or an older one was not"
            )
        if missing := self.missing(iteration):
            raise FleetError(f"iteration {iteration} lacks groups {missing[:8]}")
        if iteration - held.version > self.max_staleness:
            raise FleetError(
                f"iteration {iteration} was drawn with the weights of {held.version} updates: "
                f"staleness {iteration - held.version} is above {self.max_staleness}"
            )
        held.taken = True
        content = self.content(iteration)
        held.groups.clear()
        return content

    def release(self, iteration: int) -> None:
        """Free an iteration's slots: the weights that were learned from it are live.

        Raises:
            FleetError: it was not consumed.
        """
        if not self._find(iteration).taken:
            raise FleetError(f"iteration {iteration} was released before it was consumed")
        del self._held[iteration]
        self.live = iteration + 1

    def _find(self, iteration: int) -> _Held[G]:
        if iteration not in self._held:
            there = ", ".join(str(number) for number in self._held) or "none"
            raise FleetError(f"iteration {iteration} is not on its way: there are {there}")
        return self._held[iteration]
