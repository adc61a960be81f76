"""What must be done again to bring a restarted role to where the lost one was. Pure.

State at some point, and the calls since then: a role whose calls are deterministic comes out the
same, bit for bit, and a call that was under way when it died is simply made again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recorded:
    """One call."""

    method: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()


class Journal:
    """Of one role.

    Args:
        lasting: methods whose last call holds whatever comes (a reference, say): made again first.
        beginning: methods that set the whole state: what came before does not matter any more.
        changing: methods that change the state.
        restore: the method that takes up what `state` gave.
    """

    def __init__(
        self,
        *,
        lasting: Collection[str],
        beginning: Collection[str],
        changing: Collection[str],
        restore: str = "restore",
    ) -> None:
        self._lasting, self._beginning, self._changing = lasting, beginning, changing
        self._restore = restore
        self._held: dict[str, Recorded] = {}
        self._since: list[Recorded] = []
        self._dropped = 0  # calls that a state covers, since ever

    @property
    def position(self) -> int:
        """How many calls were recorded, since ever."""
        return self._dropped + len(self._since)

    @property
    def length(self) -> int:
        """Calls since the last known state."""
        return len(self._since)

    def record(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a call that was answered; those that change nothing are forgotten."""
        call = Recorded(method, args, tuple(kwargs.items()))
        if method in self._lasting:
            self._held[method] = call
        elif method in self._beginning or method == self._restore:
            self._dropped += len(self._since)
            self._since = [call]
        elif method in self._changing:
            self._since.append(call)

    def covers(self, position: int, state: bytes) -> None:
        """The state after the first `position` calls: they need not be made again."""
        count = position - self._dropped
        if not 0 < count <= len(self._since):
            return  # a call that sets everything came meanwhile
        self._since[:count] = [Recorded(self._restore, (state,))]
        self._dropped += count - 1

    def replay(self) -> list[Recorded]:
        """What a new role must be told, in order."""
        return [*self._held.values(), *self._since]
