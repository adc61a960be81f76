"""Slots that bound how many groups are pending, and so how stale rollouts can become. Pure.

There are (S + 1) P slots for iterations of P groups. An iteration takes P slots when its groups are
requested, and frees them when the weights learned from it are published. So iteration n is
requested after iteration n - S - 1 was learned from, with n - S updates at least: its staleness is
at most S by construction. `take` checks it again.

    admit --> take --> release
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import FleetError


@dataclass
class _Slots:
    """Slots of one iteration."""

    version: int
    taken: bool = False


class IterationSlots:
    """Admits iterations of groups while their staleness stays within the bound.

    Args:
        groups: P, of an iteration.
        max_staleness: S; 0 is on-policy.
        first: iteration that training begins with; the published weights have as many updates.
    """

    def __init__(self, groups: int, max_staleness: int, first: int = 0) -> None:
        if groups < 1 or max_staleness < 0 or first < 0:
            raise ValueError(
                "groups must be >= 1, max_staleness and first >= 0; found "
                f"{groups}, {max_staleness} and {first}"
            )
        self.groups, self.max_staleness = groups, max_staleness
        self.version = first
        """Policy version that is published now."""
        self.next = first
        """The iteration that is admitted next."""
        self._pending: dict[int, _Slots] = {}

    @property
    def capacity(self) -> int:
        """Slots."""
        return (self.max_staleness + 1) * self.groups

    @property
    def used(self) -> int:
        """Slots that are not free."""
        return len(self._pending) * self.groups

    @property
    def has_room(self) -> bool:
        """Whether a whole iteration fits."""
        return self.used + self.groups <= self.capacity

    def version_of(self, iteration: int) -> int:
        """Policy version that an iteration's groups are sampled with."""
        return self._find(iteration).version

    def admit(self, version: int | None = None) -> int:
        """Take slots for the next iteration; returns which it is.

        Args:
            version: policy version it is sampled with; None: the published one. Older ones are of
                iterations that were requested before a run was interrupted.

        Raises:
            FleetError: there is no room, or the version is too old, or not published yet.
        """
        iteration, sampled = self.next, self.version if version is None else version
        if not self.has_room:
            raise FleetError(
                f"iteration {iteration} was requested while {self.used} of {self.capacity} slots "
                "are taken: release an iteration first"
            )
        if not iteration - self.max_staleness <= sampled <= self.version:
            raise FleetError(
                f"iteration {iteration} cannot be sampled with the weights of {sampled} updates: "
                f"max_staleness {self.max_staleness} allows {iteration - self.max_staleness} to "
                f"{self.version}"
            )
        self._pending[iteration] = _Slots(sampled)
        self.next += 1
        return iteration

    def take(self, iteration: int) -> None:
        """Consume the oldest iteration: its groups are learned from, once.

        Raises:
            FleetError: not the oldest, consumed already, or too stale.
        """
        slots = self._find(iteration)
        if slots.taken or iteration != min(self._pending):
            raise FleetError(
                f"iteration {iteration} cannot be consumed: it was already, or an older one was not"
            )
        if iteration - slots.version > self.max_staleness:
            raise FleetError(
                f"iteration {iteration} was sampled with the weights of {slots.version} updates: "
                f"staleness {iteration - slots.version} is above {self.max_staleness}"
            )
        slots.taken = True

    def release(self, iteration: int) -> None:
        """Free an iteration's slots: the weights learned from it are published.

        Raises:
            FleetError: it was not consumed.
        """
        if not self._find(iteration).taken:
            raise FleetError(f"iteration {iteration} was released before it was consumed")
        del self._pending[iteration]
        self.version = iteration + 1

    def _find(self, iteration: int) -> _Slots:
        if iteration not in self._pending:
            pending = ", ".join(str(number) for number in self._pending) or "none"
            raise FleetError(f"iteration {iteration} is not pending; pending: {pending}")
        return self._pending[iteration]
