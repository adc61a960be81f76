"""Who worked when: the driver's stopwatch, the idle share of every role, and what bounds a run.

Everything is made of spans; the arithmetic is pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.spans import DRIVER, Span, role_of, works

FULL = 0.8
"""Busy share from which on a role is said to bound the run."""
FLAGS = {
    "sampler": "--num-samplers",
    "reward-server": "--num-reward-servers",
    "learner": "--num-learners",
    "moments-server": "--rewards.loo-fid.rebuild-every 10, with a long history",
    DRIVER: "--output.no-rollouts, or a larger --output.checkpoint-every",
}
"""Role -> the option that gives it more, or less to do."""


@dataclass(frozen=True)
class RoleUse:
    """How much a role worked."""

    role: str
    workers: int
    busy: float
    """Share of its workers' time, [0, 1]."""

    @property
    def idle(self) -> float:
        return 1 - self.busy


@dataclass
class _Worker:
    since: float
    end: float = float("-inf")
    busy_s: float = 0.0

    def add(self, span: Span) -> None:
        """Spans come about in order; where two overlap, the time counts once."""
        self.busy_s += max(span.end - max(span.start, self.end), 0.0)
        self.end = max(self.end, span.end)


class Usage:
    """Adds up working time, iteration by iteration, in constant memory.

    A worker's time begins with the first iteration, or with its first span if it came later.
    """

    def __init__(self, start: float) -> None:
        self._start, self._latest = start, start
        self._workers: dict[str, _Worker] = {}
        self._first = True

    def add(self, spans: Iterable[Span]) -> None:
        """One iteration's spans, of all workers."""
        for span in sorted(filter(works, spans), key=lambda span: span.start):
            if span.end <= self._start:
                continue
            worker = self._workers.get(span.worker)
            if worker is None:
                since = self._start if self._first else span.start
                worker = self._workers[span.worker] = _Worker(since, end=self._start)
            worker.add(span)
            self._latest = max(self._latest, span.end)
        self._first = False

    def shares(self) -> list[RoleUse]:
        """Every role so far, busiest first."""
        roles: dict[str, list[_Worker]] = {}
        for name, worker in self._workers.items():
            roles.setdefault(role_of(name), []).append(worker)
        found = []
        for role, workers in roles.items():
            whole = sum(self._latest - worker.since for worker in workers)
            busy = sum(worker.busy_s for worker in workers) / whole if whole > 0 else 0.0
            found.append(RoleUse(role, len(workers), min(busy, 1.0)))
        return sorted(found, key=lambda use: -use.busy)


def flag_of(role: str) -> str:
    """The option that gives a role more workers, or less to do."""
    pool = role.removeprefix("reward-")
    return FLAGS.get(role, f"num_servers of reward_pools.{pool}, in the YAML")


def bottleneck(shares: Sequence[RoleUse], max_staleness: int, *, inline: bool = False) -> str:
    """What bounds the run, and which option would move it. Empty if nothing was seen.

    Args:
        inline: every role is in one process.
    """
    if not shares:
        return ""
    if inline:
        return "bottleneck: one process does everything in turn: leave --inline out"
    top = max(shares, key=lambda use: use.busy)
    if top.busy >= FULL:
        many = "s were" if top.workers > 1 else " was"
        return f"bottleneck: the {top.role}{many} busy {top.busy:.0%}: {flag_of(top.role)}"
    return (
        f"bottleneck: the roles wait for each other (the busiest, {top.role}, was busy "
        f"{top.busy:.0%}): --max-staleness {max_staleness + 1}"
    )
