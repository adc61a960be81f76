"""Snapshots that samplers may still need: the newest version, and older ones of pending groups.

A group is drawn with the policy version that was newest when the group was requested, by any
sampler at any time: results do not depend on timing. No Ray.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cluster.errors import FleetError

NO_WEIGHTS = -1  # version of a fleet or sampler before the first broadcast
OWN_WEIGHTS = 0  # of samplers that load the policy by themselves (`FleetPlan.own_weights`)


class WeightVersions:
    """Policy version -> reference to its snapshot."""

    def __init__(self) -> None:
        self._snapshots: dict[int, Any] = {}
        self.newest = NO_WEIGHTS

    def __len__(self) -> int:
        return len(self._snapshots)

    def __getitem__(self, version: int) -> Any:
        return self._snapshots[version]

    def publish(self, version: int, snapshot: Any) -> None:
        """Add a version.

        Raises:
            FleetError: it is not newer than the others.
        """
        if version <= self.newest:
            raise FleetError(f"weights of version {version} follow those of version {self.newest}")
        self.newest = version
        self._snapshots[version] = snapshot

    def oldest(self, needed: Iterable[int]) -> int:
        """The oldest version that pending groups need. Drops older snapshots, which lets the object
        store free them."""
        first = min(needed, default=self.newest)
        for version in [version for version in self._snapshots if version < first]:
            del self._snapshots[version]
        return first
