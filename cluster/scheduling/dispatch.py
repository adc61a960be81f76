"""Which worker gets the next task, and how many at once, by expected finish time. Arithmetic alone.

A task goes to the worker that is expected to finish it first, by its measured pace: a slow worker
with the last task of an iteration would delay everybody. Results do not depend on who does what, so
that measured times may decide it. They are noisy: workers with about the same finish time take
turns, and a worker's first call does not count (it warms up).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MEMORY = 0.9  # weight of the moving average, per task
CLOSE = 0.5  # share of a task's time: finish times that differ by less count as equal


class Pace:
    """Seconds a task of one worker: a moving average, without its first call."""

    def __init__(self) -> None:
        self._seconds, self._tasks, self._warm = 0.0, 0.0, False

    def add(self, seconds: float, tasks: int) -> None:
        """Add a call: its time, and how many tasks it completed."""
        if not self._warm:
            self._warm = tasks > 0
            return
        kept = MEMORY**tasks
        self._seconds = kept * self._seconds + seconds
        self._tasks = kept * self._tasks + tasks

    @property
    def value(self) -> float | None:
        """None before the second call, and where work takes no time."""
        return self._seconds / self._tasks if self._seconds and self._tasks else None


@dataclass(eq=False, slots=True)
class Candidate:
    """What the choice needs to know of a worker."""

    pace: float | None
    """Seconds a task; None if not known."""
    tasks: int
    """Assigned and not finished."""
    current: float
    """Of those, how many are in the call that runs now."""
    elapsed: float
    """Seconds since that call began, or since the last one ended."""
    weight_version: int
    """Tasks of older weights cannot be done."""
    has_room: bool
    """Whether it may be given tasks now."""


def paces(workers: Sequence[Candidate]) -> list[float]:
    """Seconds a task of each worker; the mean where it is not known, and 1 where nothing is."""
    known = [worker.pace for worker in workers if worker.pace is not None]
    mean = sum(known) / len(known) if known else 1.0
    return [mean if worker.pace is None else worker.pace for worker in workers]


def free_in(worker: Candidate, pace: float) -> float:
    """Seconds until a worker is expected to have finished its tasks. A late one is expected to take
    as long again as it is late."""
    if not worker.tasks:
        return 0.0
    now = worker.current * pace
    left = abs(now - worker.elapsed) if worker.pace is not None else now
    return left + max(worker.tasks - worker.current, 0.0) * pace


def choose(runs: Sequence[tuple[int, int]], workers: Sequence[Candidate]) -> tuple[int, int] | None:
    """The next task to hand out, and its worker: of those with room, the one that would finish it
    first. Tasks that workers without room would finish earlier are left for these.

    Args:
        runs: (weight version, number of tasks) of the waiting tasks, in order.

    Returns:
        Places of the task and of the worker; None if nothing is to be handed out now.
    """
    if not any(worker.has_room for worker in workers):
        return None
    pace, place = paces(workers), 0
    ends = [free_in(worker, each) + each for worker, each in zip(workers, pace)]
    for version, count in runs:
        able = [i for i, worker in enumerate(workers) if worker.weight_version <= version]
        if ready := [i for i in able if workers[i].has_room]:
            first = min(ready, key=ends.__getitem__)
            latest = ends[first] + CLOSE * pace[first]
            turns = (i for i in ready if ends[i] <= latest)
            best = min(turns, key=lambda i: (workers[i].tasks, -workers[i].elapsed, i))
            gaps = (
                (ends[first] - CLOSE * pace[i] - ends[i]) / pace[i]
                for i in able
                if not workers[i].has_room
            )
            left = max(sum(math.ceil(gap) for gap in gaps if gap > 0), place)
            if left < place + count:
                return left, best
        place += count
    return None


def batch_size(most: int, waiting: int, workers: Sequence[Candidate], chosen: int) -> int:
    """How many tasks a worker is given in one call: no more than its share of those that wait, by
    speed, so that all workers end at about the same time. A power of two, since a sampler keeps
    buffers for each size.

    Args:
        most: largest number; at least 1.
        waiting: tasks that could go together.
        workers: that could be given them.
        chosen: place of the worker among them.
    """
    pace, size = paces(workers), 1
    free = [free_in(worker, each) for worker, each in zip(workers, pace)]
    while 2 * size <= most:
        end = free[chosen] + 2 * size * pace[chosen]
        shares = ((end - free[i]) / pace[i] for i in range(len(workers)) if i != chosen)
        if 2 * size + sum(int(share) for share in shares if share > 0) > waiting:
            break
        size *= 2
    return size
