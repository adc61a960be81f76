"""The queue of a pool: tasks in order, in batches of like tasks, which may share a call. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cluster import clock


@dataclass
class Waiting:
    """A task in the queue."""

    task: Any
    weight_version: int = 0
    """Policy version that it needs; of samplers' tasks."""
    kind: Any = None
    """Tasks of one kind and weight version may share a call."""
    rows: int = 1
    """Rows that it adds to a call; equal for all of a kind."""
    since: float = field(default_factory=clock.monotonic)

    def goes_with(self, other: Waiting) -> bool:
        """Whether both may share a call."""
        return (self.weight_version, self.kind) == (other.weight_version, other.kind)


class WorkQueue:
    """Waiting tasks, ordered by weight version, then by arrival. Neighbours that may share a call
    form a batch. Operations take time in the number of batches, not of tasks."""

    def __init__(self) -> None:
        self._batches: list[list[Waiting]] = []

    def __len__(self) -> int:
        return sum(map(len, self._batches))

    def __iter__(self) -> Iterator[Waiting]:
        return (waiting for batch in self._batches for waiting in batch)

    @property
    def first(self) -> Waiting:
        """The first task; there must be one."""
        return self._batches[0][0]

    def batches(self) -> list[tuple[int, int]]:
        """(weight version, number of tasks) of each batch, in order."""
        return [(batch[0].weight_version, len(batch)) for batch in self._batches]

    def add(self, waiting: Waiting) -> None:
        """Append a task."""
        if self._batches and self._batches[-1][0].goes_with(waiting):
            self._batches[-1].append(waiting)
        else:
            self._batches.append([waiting])

    def add_first(self, waiting: Waiting) -> None:
        """Insert a task before those of its weight version and of newer ones."""
        place = next(
            (
                i
                for i, batch in enumerate(self._batches)
                if batch[0].weight_version >= waiting.weight_version
            ),
            len(self._batches),
        )
        if place < len(self._batches) and self._batches[place][0].goes_with(waiting):
            self._batches[place].insert(0, waiting)
        else:
            self._batches.insert(place, [waiting])

    def alike(self, place: int) -> int:
        """Number of tasks from a place on that may share a call."""
        number, offset = self._find(place)
        return len(self._batches[number]) - offset

    def at(self, place: int) -> Waiting:
        """The first task of the batch at a place."""
        return self._batches[self._find(place)[0]][0]

    def take(self, place: int, count: int) -> list[Waiting]:
        """Remove and return `count` like tasks from a place on."""
        number, offset = self._find(place)
        batch = self._batches[number]
        taken = batch[offset : offset + count]
        del batch[offset : offset + count]
        if not batch:
            del self._batches[number]
            self._join()
        return taken

    def remove(self, unwanted: Callable[[Any], bool]) -> None:
        """Drop the tasks for which `unwanted` is true."""
        kept = ([w for w in batch if not unwanted(w.task)] for batch in self._batches)
        self._batches = [batch for batch in kept if batch]
        self._join()

    def clear(self) -> None:
        self._batches.clear()

    def _join(self) -> None:
        """Merge neighbouring batches of like tasks."""
        batches, self._batches = self._batches, []
        for batch in batches:
            if self._batches and self._batches[-1][0].goes_with(batch[0]):
                self._batches[-1] += batch
            else:
                self._batches.append(batch)

    def _find(self, place: int) -> tuple[int, int]:
        """Number of the batch that holds a place, and the offset within the batch."""
        for number, batch in enumerate(self._batches):
            if place < len(batch):
                return number, place
            place -= len(batch)
        raise IndexError(f"{len(self)} tasks wait, none at {place}")
