"""The weights that samplers may still need: the newest, and older ones that groups wait for.

Every broadcast is an edition, numbered from 1. A group is drawn with the edition that was newest
when it was asked for, whichever sampler draws it and whenever: results do not depend on who was
fast. No Ray.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Editions:
    """Edition -> reference to its snapshot."""

    def __init__(self) -> None:
        self._snapshots: dict[int, Any] = {}
        self.newest = 0
        """0: nothing was published yet."""

    def __len__(self) -> int:
        return len(self._snapshots)

    def __getitem__(self, edition: int) -> Any:
        return self._snapshots[edition]

    def publish(self, snapshot: Any) -> int:
        """Take a new edition; returns its number."""
        self.newest += 1
        self._snapshots[self.newest] = snapshot
        return self.newest

    def amend(self, snapshot: Any) -> None:
        """The newest edition by another way: the same weights."""
        self._snapshots[self.newest] = snapshot

    def oldest(self, needed: Iterable[int]) -> int:
        """The oldest edition that is needed, by groups that wait or are at work. Older ones are
        forgotten, and the object store may drop them."""
        first = min(needed, default=self.newest)
        for edition in [edition for edition in self._snapshots if edition < first]:
            del self._snapshots[edition]
        return first
