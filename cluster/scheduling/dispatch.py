"""Who gets the next task of work, and how many at once: from measured speed. Arithmetic alone.

Work is handed to the worker that is expected to finish it first, not to whoever has a hand free: a
slow one that took the last task of an iteration would keep everybody waiting. Who does what never
changes a result, so that measured times may decide it.

Measured times are noisy, and a worker that is given nothing is not measured again. So those that
would end a task at about the same time take turns, a worker's first call does not count (it warms
up), and one that was passed over for long is tried again.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import inf

MEMORY = 0.9  # weight of what was measured before, with every task
CLOSE = 0.5  # of the best worker's pace: ends of a task that differ by less count as equal
TRY_AGAIN = 2.0  # times the tasks that others do while an idle worker would do one


class Pace:
    """A worker's seconds a task of work: a moving average, without its first call."""

    def __init__(self) -> None:
        self._seconds, self._pieces, self._warm = 0.0, 0.0, False

    def add(self, seconds: float, tasks: int) -> None:
        """So much more work, and how many tasks it completed."""
        if not self._warm:
            self._warm = tasks > 0
            return
        kept = MEMORY**tasks
        self._seconds = kept * self._seconds + seconds
        self._pieces = kept * self._pieces + tasks

    @property
    def value(self) -> float | None:
        """None before the second call, and where work takes no time."""
        return self._seconds / self._pieces if self._seconds and self._pieces else None


@dataclass(eq=False, slots=True)
class Candidate:
    """A worker, as the choice sees it."""

    pace: float | None
    """Seconds a task; None if not known."""
    tasks: int
    """That it has in hand."""
    current: float
    """Of those, how many it works on now (a call may hold several)."""
    elapsed: float
    """Seconds since it began with those."""
    weight_version: int
    """Weights that it cannot go behind."""
    has_room: bool
    """Whether it may be given work now."""
    passed_over: int = 0
    """Pieces that others were given since it has had nothing in hand."""


def paces(workers: Sequence[Candidate]) -> list[float]:
    """Seconds a task of each worker; the others' mean where it is not known, and 1 where nothing
    is. One that is to be tried again counts as the fastest."""
    known = [worker.pace for worker in workers if worker.pace is not None]
    mean = sum(known) / len(known) if known else 1.0
    pace = [mean if worker.pace is None else worker.pace for worker in workers]
    passed = [index for index, worker in enumerate(workers) if worker.passed_over]
    speed = sum(1 / each for each in pace) if passed else 0.0
    for index in passed:
        worker = workers[index]
        others = speed * pace[index] - 1  # tasks that they do while it does one
        if worker.passed_over > TRY_AGAIN * others > 0:
            pace[index] = min(pace)
    return pace


def free_in(worker: Candidate, pace: float) -> float:
    """Seconds until a worker is expected to have finished what it has in hand. Of one that is late,
    it is expected to take as long again as it is late."""
    if not worker.tasks:
        return 0.0
    now = worker.current * pace
    left = abs(now - worker.elapsed) if worker.pace is not None else now
    return left + max(worker.tasks - worker.current, 0.0) * pace


def choose(weight_versions: Iterable[int], workers: Sequence[Candidate]) -> tuple[int, int] | None:
    """The next handing-out, from a plan for all work that waits: each task in turn to whoever is
    expected to finish it first, or nearly so (of those: one with room, with the fewest in hand, who
    began longest ago). The first task that falls to a worker with room is handed out; those that
    fall to one without room wait for it.

    Args:
        weight_versions: of the waiting tasks, in order; a worker with newer weights cannot do one.

    Returns:
        Place of the task and of the worker; None where nothing is to be handed out now.
    """
    runs = [
        (weight_version, sum(1 for _ in run)) for weight_version, run in groupby(weight_versions)
    ]
    return choose_of_runs(runs, workers)


def choose_of_runs(
    runs: Sequence[tuple[int, int]], workers: Sequence[Candidate]
) -> tuple[int, int] | None:
    """`choose`, of (weight version, number of tasks): tasks that no worker can do cost nothing."""
    if not any(worker.has_room for worker in workers):
        return None
    plan, place = _Plan(workers), 0
    for number, (weight_version, count) in enumerate(runs):
        if plan.admit(weight_version):
            for offset in range(count):
                best = plan.give()
                if workers[best].has_room:
                    return place + offset, best
                if plan.given == 1 and plan.holds_back(runs[number:]):
                    return None
        place += count
    return None


def batch_size(most: int, waiting: int, workers: Sequence[Candidate], chosen: int) -> int:
    """How many tasks a worker is given in one call: as many as the same plan gives it of all that
    wait; so that the last tasks are spread over all workers, and a slow one takes few. A power of
    two: every size has buffers of its own.

    Args:
        most: largest number; at least 1.
        waiting: tasks that could go together.
        workers: that could be given them.
        chosen: which one is.
    """
    plan, count = _Plan(workers), 0
    plan.admit(max(worker.weight_version for worker in workers))
    if waiting > plan.enough_for(chosen, most):
        count = most
    else:
        for _ in range(waiting):
            count += plan.give() == chosen
            if count == most:
                break
    return int(2 ** (max(count, 1).bit_length() - 1))


class _Plan:
    """Gives one task after another to whoever would finish it first, or nearly so. To begin one
    takes a look at each worker; to give a task, the logarithm of their number."""

    def __init__(self, workers: Sequence[Candidate]) -> None:
        self._workers, self._pace = workers, paces(workers)
        self._end = [free_in(worker, pace) + pace for worker, pace in zip(workers, self._pace)]
        """When each would end one more task."""
        self._pieces = [worker.tasks for worker in workers]
        self._able: list[int] = []
        self._edition = 0
        self._trees: _Trees | None = None
        self.given = 0

    def admit(self, weight_version: int) -> bool:
        """From now on, tasks that need this weight_version are given; whether anybody is able to do
        them."""
        if not self._able or weight_version != self._edition:
            self._edition, workers = weight_version, self._workers
            self._able = [
                i for i, worker in enumerate(workers) if worker.weight_version <= weight_version
            ]
            self._trees = None
        return bool(self._able)

    def give(self) -> int:
        """The worker, of those that are able, that the next task falls to."""
        if not self.given:  # often, that is all there is to give
            first = min(self._able, key=self._end.__getitem__)
            latest = self._end[first] + CLOSE * self._pace[first]
            best = min((i for i in self._able if self._end[i] <= latest), key=self._turn)
        else:
            if self._trees is None:
                self._trees = _Trees(self._able, self._end, self._turn)
            first = self._trees.first
            best = self._trees.best(self._end[first] + CLOSE * self._pace[first])
        self.given += 1
        self._end[best] += self._pace[best]
        self._pieces[best] += 1
        if self._trees is not None:
            self._trees.moved(best)
        return best

    def holds_back(self, runs: Sequence[tuple[int, int]]) -> bool:
        """Whether all tasks of some runs certainly fall to workers without room. None falls to one
        with room before the others would all end theirs about as late as that one its next: how
        many they have been given by then, at the least, is a sum."""
        workers, oldest = self._workers, min(weight_version for weight_version, _ in runs)
        busy = [i for i, worker in enumerate(workers) if not worker.has_room]
        if not busy:
            return False
        soonest = min(end for end, w in zip(self._end, workers) if w.has_room)
        bound = soonest - CLOSE * max(self._pace[i] for i in busy)
        able = (i for i in busy if workers[i].weight_version <= oldest)
        gaps = ((bound - self._end[i]) / self._pace[i] for i in able)
        return sum(int(gap) for gap in gaps if gap > 0) > sum(count for _, count in runs)

    def enough_for(self, chosen: int, most: int) -> float:
        """So many tasks are enough for one worker to be given `most` of them, for certain: until
        then, no other is given one that would end long after its last."""
        last = self._end[chosen] + most * self._pace[chosen]
        bound = last + CLOSE * max(self._pace[i] for i in self._able)
        gaps = ((bound - self._end[i]) / self._pace[i] for i in self._able)
        return sum(int(gap) + 2 for gap in gaps if gap > -1)

    def _turn(self, index: int) -> tuple[bool, int, float, int]:
        worker = self._workers[index]
        return not worker.has_room, self._pieces[index], -worker.elapsed, index


class _Trees:
    """Which of some workers ends its next task first, and whose turn it is of those that end it by
    some time.

    Args:
        able: the workers, by index.
        end: when each would end its next task; the owner changes it, and says so.
        turn: (no room, tasks in hand, and what never changes): the least comes first.
    """

    def __init__(
        self,
        able: Sequence[int],
        end: Sequence[float],
        turn: Callable[[int], tuple[bool, int, float, int]],
    ) -> None:
        self._able, self._end = able, end
        self._by_turn = sorted(able, key=lambda index: turn(index)[2:])
        self._place = {index: place for place, index in enumerate(self._by_turn)}
        self._number = {index: number for number, index in enumerate(able)}
        self._ends = _Minima([end[index] for index in able])
        self._level = {index: turn(index)[:2] for index in able}
        self._levels: dict[tuple[bool, int], _Minima] = {}
        for level in set(self._level.values()):
            here = [end[i] if self._level[i] == level else inf for i in self._by_turn]
            self._levels[level] = _Minima(here)
        self._order = sorted(self._levels)

    @property
    def first(self) -> int:
        """Who ends its next task first."""
        return self._able[self._ends.first(self._ends.least)]

    def best(self, latest: float) -> int:
        """Whose turn it is, of those that end theirs by some time."""
        levels = self._levels
        while levels[self._order[0]].least == inf:
            del levels[self._order.pop(0)]
        for level in self._order:
            if levels[level].least <= latest:
                return self._by_turn[levels[level].first(latest)]
        raise ValueError(f"nobody ends a task by {latest}")

    def moved(self, index: int) -> None:
        """A worker was given a task."""
        place, end, level = self._place[index], self._end[index], self._level[index]
        self._levels[level].put(place, inf)
        level = self._level[index] = level[0], level[1] + 1
        if level not in self._levels:
            self._levels[level] = _Minima([inf] * len(self._by_turn))
            insort(self._order, level)
        self._levels[level].put(place, end)
        self._ends.put(self._number[index], end)


class _Minima:
    """Numbers in a row, and the least of them: a tree of minima."""

    def __init__(self, numbers: Sequence[float]) -> None:
        self._size = size = 1 << max(len(numbers) - 1, 0).bit_length()
        self._nodes = nodes = [*[inf] * size, *numbers, *[inf] * (size - len(numbers))]
        for node in range(size - 1, 0, -1):
            nodes[node] = min(nodes[2 * node], nodes[2 * node + 1])

    @property
    def least(self) -> float:
        return self._nodes[1]

    def put(self, place: int, number: float) -> None:
        nodes, node = self._nodes, self._size + place
        nodes[node] = number
        while node > 1:
            other, node = nodes[node ^ 1], node >> 1
            least = number if number <= other else other
            if nodes[node] == least:
                return
            nodes[node] = number = least

    def first(self, bound: float) -> int:
        """The first place with a number of at most `bound`; there is one."""
        nodes, node = self._nodes, 1
        while node < self._size:
            node *= 2
            if nodes[node] > bound:
                node += 1
        return node - self._size
