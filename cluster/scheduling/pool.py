"""The workers of one role, and the tasks that wait for them. Decisions only, no Ray.

    starting --> serving --> draining --> gone
        '<--- lost <--'---------'

A worker gets tasks only while it serves; a draining one finishes its tasks; a lost one keeps its
place for its replacement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from cluster import clock
from cluster.roles import Role
from cluster.scheduling.autoscaling import LoadMeter
from cluster.scheduling.dispatch import Candidate, Pace, batch_size, choose
from cluster.scheduling.weight_versions import NO_WEIGHTS
from cluster.scheduling.work_queue import Waiting, WorkQueue
from cluster.spans import Span


class State(Enum):
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    LOST = "lost"


@dataclass(eq=False)
class Worker:
    """One actor of a role."""

    role: Role
    index: int
    handle: Any
    """Ray's actor handle: its methods are those of the role."""
    ready: Any = None
    """Reference that is ready when the worker can serve."""
    addition: bool = False
    """Added by scaling: if it cannot start, the run continues without it."""
    state: State = State.STARTING
    busy: int = 0
    """Calls it has."""
    tasks: int = 0
    """Tasks in them."""
    begun: float = 0.0
    """When its current call began, as far as this process can tell."""
    pace: Pace = field(default_factory=Pace)
    decoding: int = 0
    """Of a sampler: groups whose images it decodes or will decode, beside its tasks."""
    worked_until: float = 0.0
    """Seconds since the epoch: end of the work counted last."""
    waits_for: str = ""
    """Why no node had room for it when it was started; empty if one had."""
    weight_version: int = NO_WEIGHTS
    """Of a sampler: policy version it was sent last. It never decreases."""
    since: float = field(default_factory=clock.monotonic)
    last_response: float = field(default_factory=clock.monotonic)
    """Time of the last answer, or of the first call after an idle time."""
    calls: dict[int, tuple[object, float]] = field(default_factory=dict)
    """Pending calls by number: (description, start)."""

    @property
    def name(self) -> str:
        return self.role.worker_name(self.index)

    def at(self, now: float) -> str:
        """The oldest call it has, for messages; empty if it has none."""
        if not self.calls:
            return ""
        what, since = min(self.calls.values(), key=lambda call: call[1])
        return f"{what} for {now - since:.0f} s"

    @property
    def has_room(self) -> bool:
        """Whether it may be given another call. Images being decoded do not count, unless many
        pile up because they take longer than tokens."""
        images = self.role.depth * self.role.max_groups
        return self.busy < self.role.depth and self.decoding <= images

    @property
    def idle(self) -> bool:
        return self.busy == self.decoding == 0

    def take(self, tasks: int = 1, now: float | None = None) -> None:
        """Count a call that was given to it."""
        if not self.busy:
            self.begun = clock.monotonic() if now is None else now
        self.busy += 1
        self.tasks += tasks

    def give(self, tasks: int = 1, now: float | None = None) -> None:
        """Count a call that ended."""
        self.begun = clock.monotonic() if now is None else now
        self.busy -= 1
        self.tasks -= tasks

    def candidate(self, now: float) -> Candidate:
        """What `dispatch.choose` needs to know."""
        return Candidate(
            self.pace.value,
            self.tasks,
            self.tasks / self.busy if self.busy else 0.0,
            now - self.begun,
            self.weight_version,
            self.has_room,
        )

    def count_work(self, span: Span) -> float:
        """Seconds of a span that were not counted yet: overlaps count once."""
        seconds = max(span.end - max(span.start, self.worked_until), 0.0)
        self.worked_until = max(self.worked_until, span.end)
        return seconds


class WorkerPool:
    """The workers of a role, and the work that waits for them.

    Args:
        launch: starts one worker: (role, index, whether it is an addition, whether it must not wait
            for room because no other serves).
        stop: kills one worker.
    """

    def __init__(
        self,
        role: Role,
        launch: Callable[[Role, int, bool, bool], Worker],
        stop: Callable[[Worker], None],
    ) -> None:
        self.role, self._launch, self._stop = role, launch, stop
        self.workers = [launch(role, index, False, False) for index in range(role.count)]
        self.waiting = WorkQueue()
        self.meter = LoadMeter(clock.monotonic())

    @property
    def target(self) -> int:
        """Wanted number of workers."""
        return sum(worker.state is not State.DRAINING for worker in self.workers)

    def of(self, state: State) -> list[Worker]:
        return [worker for worker in self.workers if worker.state is state]

    def add(
        self,
        task: Any,
        *,
        front: bool = False,
        weight_version: int = 0,
        kind: Any = None,
        rows: int = 1,
    ) -> None:
        """Queue a task: at the end, or (`front`) before the others of its weight version."""
        waiting = Waiting(task, weight_version, kind, rows)
        if front:
            self.waiting.add_first(waiting)
        else:
            self.waiting.add(waiting)

    def next(self, now: float | None = None) -> tuple[list[Waiting], Worker] | None:
        """The next tasks to hand out, of one kind, and the worker for them; None if there are no
        tasks, no room, or if workers without room would finish them earlier."""
        if not self.waiting:
            return None
        serving = self.of(State.SERVING)
        if not any(worker.busy < self.role.depth for worker in serving):
            return None  # the most frequent case
        now = clock.monotonic() if now is None else now
        candidates = [worker.candidate(now) for worker in serving]
        chosen = choose(self.waiting.batches(), candidates)
        if chosen is None:
            return None
        place, index = chosen
        count = 1
        if self.role.max_groups > 1:
            first = self.waiting.at(place)
            able = [each for each in candidates if each.weight_version <= first.weight_version]
            which, alike = able.index(candidates[index]), self.waiting.alike(place)
            count = batch_size(self.role.groups_in_call(first.rows), alike, able, which)
        return self.waiting.take(place, count), serving[index]

    def scale(self, count: int) -> None:
        """Start or drain workers until there are `count`. Draining ones are kept before new ones
        start; those that do not serve yet are drained first, then the newest."""
        for worker in self.of(State.DRAINING)[: max(count - self.target, 0)]:
            worker.state = State.SERVING
        while self.target < count:
            taken = {worker.index for worker in self.workers}
            index = next(i for i in range(len(taken) + 1) if i not in taken)
            self.workers.append(self._launch(self.role, index, True, False))
        leaving = sorted(
            [worker for worker in self.workers if worker.state is not State.DRAINING],
            key=lambda worker: (worker.state is not State.SERVING, worker.index),
        )[count:]
        for worker in leaving:
            worker.state = State.DRAINING
        self.dismiss()

    def dismiss(self) -> list[Worker]:
        """End drained workers."""
        done = [worker for worker in self.of(State.DRAINING) if worker.idle]
        for worker in done:
            self.drop(worker)
        return done

    def drop(self, worker: Worker) -> None:
        """Kill a worker and forget it."""
        self.workers.remove(worker)
        self._stop(worker)

    def recycle(self) -> Worker | None:
        """Replace an idle worker by a new one, if the next task needs older weights than any worker
        has: the worker that should have done it was lost."""
        coming = self.of(State.SERVING) + self.of(State.STARTING)
        if not self.waiting or any(
            worker.weight_version <= self.waiting.first.weight_version for worker in coming
        ):
            return None
        idle = next((w for w in self.of(State.SERVING) if w.idle), None)
        if idle is None:  # all are busy; they get no new tasks, so one is idle soon
            return None
        self._stop(idle)
        return self.replace(idle)

    def replace(self, worker: Worker) -> Worker | None:
        """Start a replacement of a lost worker; None if it was draining, or is gone already."""
        if worker not in self.workers:
            return None
        if worker.state is State.DRAINING:
            self.workers.remove(worker)
            return None
        others = (each for each in self.of(State.SERVING) if each is not worker)
        alone = not any(others)  # no other can do its tasks meanwhile
        new = self._launch(self.role, worker.index, worker.addition, alone)
        self.workers[self.workers.index(worker)] = new
        return new
