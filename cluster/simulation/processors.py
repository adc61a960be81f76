"""Cores of a machine, or a GPU, shared by what runs on them."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from cluster.simulation.engine import Engine, Event


class Job:
    """Work on a processor."""

    __slots__ = ("demand", "done", "ends")

    def __init__(self, ends: float, demand: float, done: Callable[[], None] | None) -> None:
        self.ends, self.demand, self.done = ends, demand, done


class Processor:
    """Shares its capacity equally: while more is asked for than there is, all jobs slow down by the
    same factor (processor sharing).

    Args:
        capacity: cores; of a GPU 1.
    """

    def __init__(self, engine: Engine, capacity: float) -> None:
        self._engine, self._capacity = engine, capacity
        self._served = 0.0  # seconds that a job alone would have had since the beginning
        self._seen = engine.now
        self._demand = 0.0
        self._jobs: list[tuple[float, int, Job]] = []
        self._numbers = 0
        self._next: Event | None = None
        self.busy_s = 0.0
        """Seconds in use, times the share of the capacity in use."""

    def start(self, seconds: float, demand: float, done: Callable[[], None]) -> Job:
        """Begin a job.

        Args:
            seconds: that it takes alone.
            demand: cores that it uses; 1 of a GPU.
            done: called at its end.
        """
        self._advance()
        job = Job(self._served + seconds, demand, done)
        self._numbers += 1
        heapq.heappush(self._jobs, (job.ends, self._numbers, job))
        self._demand += demand
        self._plan()
        return job

    def cancel(self, job: Job) -> None:
        """End a job early; its end is not reported."""
        if job.done is not None:
            self._advance()
            job.done = None
            self._demand -= job.demand
            self._plan()

    @property
    def _rate(self) -> float:
        return min(1.0, self._capacity / self._demand) if self._demand else 1.0

    def _advance(self) -> None:
        passed = self._engine.now - self._seen
        self._seen = self._engine.now
        if self._demand:
            self._served += passed * self._rate
            self.busy_s += passed * min(self._demand, self._capacity)

    def _plan(self) -> None:
        if self._next is not None:
            self._next.cancel()
            self._next = None
        while self._jobs and self._jobs[0][2].done is None:
            heapq.heappop(self._jobs)
        if not self._jobs:
            self._demand = 0.0  # no rounding is left of what was added and taken
            return
        left = (self._jobs[0][0] - self._served) / self._rate
        self._next = self._engine.after(left, self._end)

    def _end(self) -> None:
        self._next = None
        self._advance()
        _, _, job = heapq.heappop(self._jobs)
        self._served = max(self._served, job.ends)  # rounding
        self._demand -= job.demand
        done, job.done = job.done, None
        self._plan()
        if done is not None:
            done()
