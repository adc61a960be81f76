"""The queue of a pool: tasks in order, in runs of tasks that may share a call. No Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Waiting:
    """A task in the queue."""

    task: Any
    weight_version: int = 0
    """Policy version that it needs; of samplers' tasks."""
    kind: Any = None
    """Tasks of one kind and weight version may share a call."""
    since: float = field(default_factory=time.monotonic)

    def goes_with(self, other: Waiting) -> bool:
        """Whether both may share a call."""
        return (self.weight_version, self.kind) == (other.weight_version, other.kind)


class WorkQueue:
    """Waiting tasks, ordered by weight version, then by arrival. Operations cost as much as there
    are runs of alike tasks (a few), however many tasks wait."""

    def __init__(self) -> None:
        self._runs: list[list[Waiting]] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def __iter__(self) -> Iterator[Waiting]:
        return (waiting for run in self._runs for waiting in run)

    @property
    def first(self) -> Waiting:
        """The first task; there must be one."""
        return self._runs[0][0]

    def runs(self) -> list[tuple[int, int]]:
        """(weight version, number of tasks) of each run, in order."""
        return [(run[0].weight_version, len(run)) for run in self._runs]

    def add(self, waiting: Waiting) -> None:
        """Append a task."""
        if self._runs and self._runs[-1][0].goes_with(waiting):
            self._runs[-1].append(waiting)
        else:
            self._runs.append([waiting])

    def add_first(self, waiting: Waiting) -> None:
        """Insert a task before those of its weight version and of newer ones."""
        place = next(
            (
                i
                for i, run in enumerate(self._runs)
                if run[0].weight_version >= waiting.weight_version
            ),
            len(self._runs),
        )
        if place < len(self._runs) and self._runs[place][0].goes_with(waiting):
            self._runs[place].insert(0, waiting)
        else:
            self._runs.insert(place, [waiting])

    def alike(self, place: int) -> int:
        """How many tasks from a place on may share a call."""
        number, offset = self._find(place)
        return len(self._runs[number]) - offset

    def weight_version(self, place: int) -> int:
        return self._runs[self._find(place)[0]][0].weight_version

    def take(self, place: int, count: int) -> list[Waiting]:
        """Remove and return some alike tasks from a place on."""
        number, offset = self._find(place)
        run = self._runs[number]
        taken = run[offset : offset + count]
        del run[offset : offset + count]
        if not run:
            del self._runs[number]
            self._join()
        return taken

    def remove(self, unwanted: Callable[[Any], bool]) -> None:
        """Drop the tasks for which `unwanted` is true."""
        kept = ([w for w in run if not unwanted(w.task)] for run in self._runs)
        self._runs = [run for run in kept if run]
        self._join()

    def clear(self) -> None:
        self._runs.clear()

    def _join(self) -> None:
        """Merge neighbouring runs of alike tasks."""
        runs, self._runs = self._runs, []
        for run in runs:
            if self._runs and self._runs[-1][0].goes_with(run[0]):
                self._runs[-1] += run
            else:
                self._runs.append(run)

    def _find(self, place: int) -> tuple[int, int]:
        """Run of a place, and offset within it."""
        for number, run in enumerate(self._runs):
            if place < len(run):
                return number, place
            place -= len(run)
        raise IndexError(f"{len(self)} tasks wait, none at {place}")
