"""Calls to replay on a replacement of a role with deterministic calls. Pure.

Keeps the last known state and the calls since then: replayed, they give the same state bit for bit.
The call that failed is repeated by its caller.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recorded:
    """A call."""

    method: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()


class Journal:
    """The journal of one role.

    Args:
        lasting: methods whose last call is always valid (a reference, say): replayed first.
        beginning: methods that set the whole state: earlier calls are dropped.
        changing: methods that change the state.
        restore: the method that takes what `state` returned.
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
        self._dropped = 0  # calls that a state covers, in all

    @property
    def position(self) -> int:
        """How many calls were recorded in all."""
        return self._dropped + len(self._since)

    @property
    def length(self) -> int:
        """Calls since the last known state."""
        return len(self._since)

    def record(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record an answered call; those that change nothing are ignored."""
        call = Recorded(method, args, tuple(kwargs.items()))
        if method in self._lasting:
            self._held[method] = call
        elif method in self._beginning or method == self._restore:
            self._dropped += len(self._since)
            self._since = [call]
        elif method in self._changing:
            self._since.append(call)

    def covers(self, position: int, state: bytes) -> None:
        """Set the state after the first `position` calls, which it replaces."""
        count = position - self._dropped
        if not 0 < count <= len(self._since):
            return  # a call that sets the whole state came meanwhile
        self._since[:count] = [Recorded(self._restore, (state,))]
        self._dropped += count - 1

    def replay(self) -> list[Recorded]:
        """Calls to make on a new role, in order."""
        return [*self._held.values(), *self._since]
