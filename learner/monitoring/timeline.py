"""Working time of workers, from their spans: trace.json, idle share of every role, bottleneck."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.clock import epoch
from cluster.io.files import replacing, writing
from cluster.io.strict_json import dumps
from cluster.spans import DRIVER, QUEUE, Span, role_of, works

FULL = 0.8
"""A role with at least this busy share is the bottleneck."""
OVERLAPPING = (QUEUE, "decode")
"""Phases with a thread of their own in the trace: a worker's queue overlaps with its work, and a
sampler decodes images while it samples the next group's tokens."""
FLAGS = {
    "sampler": "--num-samplers",
    "reward-server": "--num-reward-servers",
    "learner": "--num-learners",
    "moments-server": "--rewards.loo-fid.num-threads",
    DRIVER: "--output.no-rollouts, or a larger --output.checkpoint-every",
}
"""Role -> the option that relieves it."""


@dataclass(frozen=True)
class RoleUse:
    """Working time of a role."""

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
        """Spans come in order of their start; overlapping time counts once."""
        self.busy_s += max(span.end - max(span.start, self.end), 0.0)
        self.end = max(self.end, span.end)


class Usage:
    """Working time of every role, iteration by iteration, in constant memory.

    A worker's time begins with the first iteration, or with its first span if it joined later.
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
    """The option that relieves a role."""
    pool = role.removeprefix("reward-")
    return FLAGS.get(role, f"num_servers of reward_pools.{pool}, in the YAML")


def bottleneck(shares: Sequence[RoleUse], max_staleness: int, *, inline: bool = False) -> str:
    """The bottleneck of a run and the option that relieves it; empty without spans.

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


class Trace:
    """Writes trace.json in Chrome's trace format, for Perfetto or chrome://tracing.

    One event a line, so that the file of a killed run can be read and continued; on another host,
    too, whose clock may be behind: time goes on from the newest event.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self._threads: dict[str, int] = {}
        self._separator = "[\n"
        events = _trace_events(path) if resume else []
        newest = max(map(_end, events), default=0)
        self._behind = max(newest - round(epoch() * 1e6), 0)
        with writing(path), replacing(path) as partial:
            self._file = partial.open("w")
            for event in events:
                if event["ph"] == "M":
                    self._threads[event["args"]["name"]] = event["tid"]
                self._write(event)
            self._file.flush()

    def add(self, spans: Iterable[Span]) -> None:
        for span in spans:
            name = f"{span.worker} {span.phase}" if span.phase in OVERLAPPING else span.worker
            thread = self._threads.get(name)
            if thread is None:
                thread = self._threads[name] = len(self._threads) + 1
                label = {"name": "thread_name", "ph": "M", "args": {"name": name}}
                self._write({**label, "pid": 1, "tid": thread})
            times = {"ts": self._time(span.start), "dur": round(span.seconds * 1e6)}
            self._write({"name": span.phase, "ph": "X", **times, "pid": 1, "tid": thread})

    def idle(self, shares: Mapping[str, float], iteration: int) -> None:
        """Add a point to the curves of the roles' idle shares, at the end of an iteration. Its
        number tells a repetition from the iteration that a resume undid."""
        values = {role: round(share, 4) for role, share in shares.items()}
        event = {"name": "idle share", "ph": "C", "ts": self._time(epoch()), "pid": 1}
        self._write({**event, "iteration": iteration, "args": values})

    def _time(self, seconds: float) -> int:
        """Microseconds."""
        return round(seconds * 1e6) + self._behind

    def flush(self) -> None:
        self._file.flush()

    def close(self, *, complete: bool = True) -> None:
        """complete: write the end of the JSON; False if another process owns the file now."""
        if complete:
            self._file.write("\n]\n" if self._separator == ",\n" else "[]\n")
        self._file.close()

    def _write(self, event: dict[str, Any]) -> None:
        self._file.write(self._separator + dumps(event))
        self._separator = ",\n"


def _trace_events(path: Path) -> list[dict[str, Any]]:
    """Complete events of an earlier process."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    events = []
    for line in lines:
        with contextlib.suppress(ValueError):  # cut short, or a bracket
            event = json.loads(line.rstrip(b","))
            if _is_event(event):
                events.append(event)
    return events


def _end(event: Mapping[str, Any]) -> int:
    """Microseconds; 0 of an event without a time."""
    times = event.get("ts", 0), event.get("dur", 0)
    return sum(times) if all(type(time) is int for time in times) else 0


def _is_event(event: Any) -> bool:
    if not isinstance(event, dict) or "ph" not in event:
        return False
    if event["ph"] != "M":
        return True
    args = event.get("args")
    return isinstance(args, dict) and "name" in args and type(event.get("tid")) is int
