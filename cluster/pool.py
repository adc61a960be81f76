"""The workers of one role: who serves, who is starting, who leaves. Decisions alone, no Ray.

    starting --> serving --> draining --> gone
        '--- lost ---'---------'

A worker gets work only when it is ready; one that leaves finishes what it has in hand.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from cluster.messages import Span
from cluster.roles import Role
from cluster.scaling import LoadMeter


class State(Enum):
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


@dataclass(eq=False)
class Worker:
    """One actor of a role."""

    role: Role
    index: int
    handle: Any
    """Ray's actor handle: its methods are those of the role."""
    ready: Any = None
    """Reference that resolves when it can serve."""
    addition: bool = False
    """Started beyond what the run began with: if it cannot start, the run goes on without it."""
    state: State = State.STARTING
    busy: int = 0
    """Requests it has in hand."""
    decoding: int = 0
    """Of a sampler: groups whose images it decodes, or is yet to, beside what it has in hand."""
    worked_until: float = 0.0
    """Seconds since the epoch: end of its work that was counted last."""
    edition: int = 0
    """Of a sampler: the weights it was sent last (`cluster.editions`). It never goes back."""
    since: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        return self.role.worker_name(self.index)

    @property
    def has_room(self) -> bool:
        """Whether it may be given more. Images in decoding leave room for tokens to sample; only
        too many of them, where images are what takes longer, do not."""
        return self.busy < self.role.depth and self.decoding <= self.role.depth

    @property
    def idle(self) -> bool:
        return self.busy == self.decoding == 0

    def count_work(self, span: Span) -> float:
        """Seconds of a span that were not counted yet: what overlaps counts once."""
        seconds = max(span.end - max(span.start, self.worked_until), 0.0)
        self.worked_until = max(self.worked_until, span.end)
        return seconds


@dataclass
class Waiting:
    """One piece of work in a pool's queue."""

    task: Any
    edition: int = 0
    """Weights that it needs; of samplers' work."""
    since: float = field(default_factory=time.monotonic)


class WorkerPool:
    """The workers of a role, and the work that waits for them.

    Args:
        launch: starts one worker; called with its index and whether it is an addition.
        stop: ends one worker at once.
    """

    def __init__(
        self,
        role: Role,
        launch: Callable[[Role, int, bool], Worker],
        stop: Callable[[Worker], None],
    ) -> None:
        self.role, self._launch, self._stop = role, launch, stop
        self.workers = [launch(role, index, False) for index in range(role.count)]
        self.waiting: deque[Waiting] = deque()
        self.meter = LoadMeter(time.monotonic())

    @property
    def target(self) -> int:
        """How many workers there are to be."""
        return sum(worker.state is not State.DRAINING for worker in self.workers)

    def of(self, state: State) -> list[Worker]:
        return [worker for worker in self.workers if worker.state is state]

    def add(self, task: Any, *, front: bool = False, edition: int = 0) -> None:
        """Queue a piece of work; at the front of its edition, if it was begun before. Editions are
        queued in order."""
        place = len(self.waiting)
        if front:
            later = (i for i, other in enumerate(self.waiting) if other.edition >= edition)
            place = next(later, place)
        self.waiting.insert(place, Waiting(task, edition))

    def next(self) -> tuple[Waiting, Worker] | None:
        """The next piece of work and the worker for it; None if there is no work, or no room."""
        if not self.waiting:
            return None
        edition = self.waiting[0].edition
        serving = self.of(State.SERVING)
        able = [worker for worker in serving if worker.edition <= edition and worker.has_room]
        if not able:
            return None
        worker = min(able, key=lambda worker: (worker.busy, worker.index))
        return self.waiting.popleft(), worker

    def scale(self, count: int) -> None:
        """Come to `count` workers: those that were to leave stay first, then new ones start; those
        that are still starting go first, then the newest."""
        for worker in self.of(State.DRAINING)[: max(count - self.target, 0)]:
            worker.state = State.SERVING
        while self.target < count:
            taken = {worker.index for worker in self.workers}
            index = next(i for i in range(len(taken) + 1) if i not in taken)
            self.workers.append(self._launch(self.role, index, True))
        leaving = sorted(
            self.of(State.STARTING) + self.of(State.SERVING),
            key=lambda worker: (worker.state is State.STARTING, worker.index),
        )[count:]
        for worker in leaving:
            worker.state = State.DRAINING
        self.dismiss()

    def dismiss(self) -> list[Worker]:
        """End those that were to leave and have nothing in hand any more."""
        done = [worker for worker in self.of(State.DRAINING) if worker.idle]
        for worker in done:
            self.drop(worker)
        return done

    def drop(self, worker: Worker) -> None:
        """End a worker at once."""
        self.workers.remove(worker)
        self._stop(worker)

    def turn_back(self) -> Worker | None:
        """Where the next piece of work needs weights that every worker has left behind, because
        whoever was to do it is gone: put a new worker in the place of an idle one."""
        coming = self.of(State.SERVING) + self.of(State.STARTING)
        if not self.waiting or any(w.edition <= self.waiting[0].edition for w in coming):
            return None
        idle = next((w for w in self.of(State.SERVING) if w.idle), None)
        if idle is None:  # all are busy: they get nothing new, so that one soon is not
            return None
        self._stop(idle)
        return self.replace(idle)

    def replace(self, worker: Worker) -> Worker | None:
        """Put another in the place of a lost one; None if it was to leave, or is gone already."""
        if worker not in self.workers:
            return None
        if worker.state is State.DRAINING:
            self.workers.remove(worker)
            return None
        new = self._launch(self.role, worker.index, worker.addition)
        self.workers[self.workers.index(worker)] = new
        return new
