"""The plan of `cluster.scheduling.dispatch` by its definition: each task looks at every worker."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.scheduling.dispatch import CLOSE, Candidate, free_in, paces


def choose(weight_versions: Sequence[int], workers: Sequence[Candidate]) -> tuple[int, int] | None:
    if not any(worker.has_room for worker in workers):
        return None
    plan = Plan(workers)
    for place, weight_version in enumerate(weight_versions):
        able = [
            index for index, worker in enumerate(workers) if worker.weight_version <= weight_version
        ]
        if not able:
            continue
        best = plan.give(able)
        if workers[best].has_room:
            return place, best
    return None


def batch_size(most: int, waiting: int, workers: Sequence[Candidate], chosen: int) -> int:
    plan, everybody, count = Plan(workers), range(len(workers)), 0
    for _ in range(waiting):
        count += plan.give(everybody) == chosen
        if count == most:
            break
    return int(2 ** (max(count, 1).bit_length() - 1))


class Plan:
    def __init__(self, workers: Sequence[Candidate]) -> None:
        self._workers, self._pace = workers, paces(workers)
        self._free = [free_in(worker, each) for worker, each in zip(workers, self._pace)]
        self._pieces = [worker.tasks for worker in workers]

    def give(self, able: Sequence[int]) -> int:
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
