"""Work that waits for a pool's workers, in order: in runs of what may go together. No Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Waiting:
    """One task of work in a pool's queue."""

    task: Any
    weight_version: int = 0
    """Weights that it needs; of samplers' work."""
    kind: Any = None
    """Pieces of one kind (and weight_version) may go to a worker in one call."""
    since: float = field(default_factory=time.monotonic)

    def goes_with(self, other: Waiting) -> bool:
        """Whether one call may hold both."""
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
        """The task that comes first; there is one."""
        return self._runs[0][0]

    def runs(self) -> list[tuple[int, int]]:
        """(weight_version, number of tasks) of tasks that come one after another."""
        return [(run[0].weight_version, len(run)) for run in self._runs]

    def add(self, waiting: Waiting) -> None:
        """At the end."""
        if self._runs and self._runs[-1][0].goes_with(waiting):
            self._runs[-1].append(waiting)
        else:
            self._runs.append([waiting])

    def add_first(self, waiting: Waiting) -> None:
        """Before all of its weight_version and of newer ones."""
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
        """How many tasks from a place on may go together."""
        number, offset = self._find(place)
        return len(self._runs[number]) - offset

    def weight_version(self, place: int) -> int:
        return self._runs[self._find(place)[0]][0].weight_version

    def take(self, place: int, count: int) -> list[Waiting]:
        """Take out so many alike tasks from a place on."""
        number, offset = self._find(place)
        run = self._runs[number]
        taken = run[offset : offset + count]
        del run[offset : offset + count]
        if not run:
            del self._runs[number]
            self._join()
        return taken

    def remove(self, unwanted: Callable[[Any], bool]) -> None:
        """Drop tasks by what their task is."""
        kept = ([w for w in run if not unwanted(w.task)] for run in self._runs)
        self._runs = [run for run in kept if run]
        self._join()

    def clear(self) -> None:
        self._runs.clear()

    def _join(self) -> None:
        """Make one run of neighbours that are alike."""
        runs, self._runs = self._runs, []
        for run in runs:
            if self._runs and self._runs[-1][0].goes_with(run[0]):
                self._runs[-1] += run
            else:
                self._runs.append(run)

    def _find(self, place: int) -> tuple[int, int]:
        """The run of a place, and the place within it."""
        for number, run in enumerate(self._runs):
            if place < len(run):
                return number, place
            place -= len(run)
        raise IndexError(f"{len(self)} tasks wait, none at {place}")
