"""Who gets the next piece of work, and how many at once: from measured speed. Arithmetic alone.

Work is handed to the worker that is expected to finish it first, not to whoever has a hand free: a
slow one that took the last piece of an iteration would keep everybody waiting. Who does what never
changes a result, so that measured times may decide it.

Measured times are noisy, and a worker that is given nothing is not measured again. So those that
would end a piece at about the same time take turns, a worker's first call does not count (it warms
up), and one that was passed over for long is tried again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MEMORY = 0.9  # weight of what was measured before, with every piece
CLOSE = 0.5  # of the best worker's pace: ends of a piece that differ by less count as equal
TRY_AGAIN = 2.0  # times the pieces that others do while an idle worker would do one


class Pace:
    """A worker's seconds a piece of work: a moving average, without its first call."""

    def __init__(self) -> None:
        self._seconds, self._pieces, self._warm = 0.0, 0.0, False

    def add(self, seconds: float, pieces: int) -> None:
        """So much more work, and how many pieces it completed."""
        if not self._warm:
            self._warm = pieces > 0
            return
        kept = MEMORY**pieces
        self._seconds = kept * self._seconds + seconds
        self._pieces = kept * self._pieces + pieces

    @property
    def value(self) -> float | None:
        """None before the second call, and where work takes no time."""
        return self._seconds / self._pieces if self._seconds and self._pieces else None


@dataclass(eq=False)
class Candidate:
    """A worker, as the choice sees it."""

    pace: float | None
    """Seconds a piece; None if not known."""
    pieces: int
    """That it has in hand."""
    current: float
    """Of those, how many it works on now (a call may hold several)."""
    elapsed: float
    """Seconds since it began with those."""
    edition: int
    """Weights that it cannot go behind."""
    has_room: bool
    """Whether it may be given work now."""
    passed_over: int = 0
    """Pieces that others were given since it has had nothing in hand."""


def paces(workers: Sequence[Candidate]) -> list[float]:
    """Seconds a piece of each worker; the others' mean where it is not known, and 1 where nothing
    is. One that is to be tried again counts as the fastest."""
    known = [worker.pace for worker in workers if worker.pace is not None]
    mean = sum(known) / len(known) if known else 1.0
    pace = [mean if worker.pace is None else worker.pace for worker in workers]
    speed = sum(1 / each for each in pace)
    for index, worker in enumerate(workers):
        others = speed * pace[index] - 1  # pieces that they do while it does one
        if worker.passed_over > TRY_AGAIN * others > 0:
            pace[index] = min(pace)
    return pace


def free_in(worker: Candidate, pace: float) -> float:
    """Seconds until a worker is expected to have finished what it has in hand. Of one that is late,
    it is expected to take as long again as it is late."""
    if not worker.pieces:
        return 0.0
    now = worker.current * pace
    left = abs(now - worker.elapsed) if worker.pace is not None else now
    return left + max(worker.pieces - worker.current, 0.0) * pace


def choose(editions: Sequence[int], workers: Sequence[Candidate]) -> tuple[int, int] | None:
    """The next handing-out, from a plan for all work that waits: each piece in turn to whoever is
    expected to finish it first, or nearly so (of those: one with room, with the fewest in hand, who
    began longest ago). The first piece that falls to a worker with room is handed out; those that
    fall to one without room wait for it.

    Args:
        editions: of the pieces that wait, in order: a worker that has gone further cannot do one.

    Returns:
        Place of the piece and of the worker; None where nothing is to be handed out now.
    """
    if not any(worker.has_room for worker in workers):
        return None
    plan = _Plan(workers)
    for place, edition in enumerate(editions):
        able = [index for index, worker in enumerate(workers) if worker.edition <= edition]
        if not able:
            continue
        best = plan.give(able)
        if workers[best].has_room:
            return place, best
    return None


def batch_size(most: int, waiting: int, workers: Sequence[Candidate], chosen: int) -> int:
    """How many pieces a worker is given in one call: as many as the same plan gives it of all that
    wait; so that the last pieces are spread over all workers, and a slow one takes few. A power of
    two: every size has buffers of its own.

    Args:
        most: largest number; at least 1.
        waiting: pieces that could go together.
        workers: that could be given them.
        chosen: which one is.
    """
    plan, everybody, count = _Plan(workers), range(len(workers)), 0
    for _ in range(waiting):
        count += plan.give(everybody) == chosen
        if count == most:
            break
    return int(2 ** (max(count, 1).bit_length() - 1))


class _Plan:
    """Gives one piece after another to whoever would finish it first, or nearly so."""

    def __init__(self, workers: Sequence[Candidate]) -> None:
        self._workers, self._pace = workers, paces(workers)
        self._free = [free_in(worker, each) for worker, each in zip(workers, self._pace)]
        self._pieces = [worker.pieces for worker in workers]

    def give(self, able: Sequence[int]) -> int:
        """The worker, of those that are able, that the next piece falls to."""
        ends = {index: self._free[index] + self._pace[index] for index in able}
        first = min(ends, key=ends.__getitem__)
        latest = ends[first] + CLOSE * self._pace[first]
        best = min((index for index in able if ends[index] <= latest), key=self._turn)
        self._free[best] = ends[best]
        self._pieces[best] += 1
        return best

    def _turn(self, index: int) -> tuple[bool, int, float, int]:
        worker = self._workers[index]
        return not worker.has_room, self._pieces[index], -worker.elapsed, index
