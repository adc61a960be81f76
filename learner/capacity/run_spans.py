"""Seconds that phases of a recorded run take alone, from its trace.json.

Processes that compute at the same time share cores, and those with parts of one GPU share it, so
that their spans are longer than their work. The trace shows who computed when, so the sharing is
taken out: of k threads on c cores each runs at min(1, c / k) of its speed.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import DataError
from cluster.io.strict_json import MALFORMED
from cluster.spans import DRIVER, Span, role_of, works

WARM_UP = 0.2  # of the iterations, left out
LEAST = 3  # iterations
HISTORY = ("decompose",)  # beside other work, and no one waits for it


@dataclass(frozen=True, kw_only=True)
class Device:
    """What processes share: a machine's cores, or a GPU."""

    capacity: float
    """Threads, or processes, that run at full speed."""
    demands: Mapping[str, float]
    """Worker or role -> how many of them it runs."""

    def demand(self, worker: str) -> float:
        return self.demands.get(worker, self.demands.get(role_of(worker), 0.0))


@dataclass(frozen=True)
class Measured:
    """Seconds of one phase of one role in an iteration, without sharing."""

    seconds: float
    """Median over iterations, of all its workers together."""
    variation: float
    """Standard deviation of single spans over their mean."""
    workers: float
    """Workers that did it, on average."""


def measure(path: Path, devices: Sequence[Device]) -> dict[tuple[str, str], Measured]:
    """(role, phase) -> seconds, of the iterations after the warm-up.

    Raises:
        DataError: no trace, or too few iterations.
    """
    iterations = list(spans_of(path))
    kept = iterations[int(len(iterations) * WARM_UP) :]
    if len(kept) < LEAST:
        raise DataError(
            f"{path}: expected at least {LEAST} iterations after a warm-up of {WARM_UP:.0%}, found "
            f"{len(kept)}: measure with a run of at least {LEAST + 1 + int(LEAST * WARM_UP)}"
        )
    every = [span for part in iterations for span in part]
    seconds = dict(zip(every, alone(every, devices)))
    totals: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    single: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    workers: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for part in kept:
        of_part: defaultdict[tuple[str, str], list[Span]] = defaultdict(list)
        for span in part:
            of_part[role_of(span.worker), span.phase].append(span)
        for key, spans in of_part.items():
            found = [seconds[span] for span in spans]
            totals[key].append(sum(found))
            single[key] += found
            workers[key].append(len({span.worker for span in spans}))
    return {
        key: Measured(
            # an iteration without the phase counts as none of it
            statistics.median([*values, *[0.0] * (len(kept) - len(values))]),
            variation_of(single[key]),
            statistics.mean(workers[key]),
        )
        for key, values in totals.items()
    }


def variation_of(values: Sequence[float]) -> float:
    """Standard deviation over mean; 0 of fewer than two values."""
    mean = statistics.fmean(values)
    return statistics.stdev(values) / mean if len(values) > 1 and mean > 0 else 0.0


def alone(spans: Sequence[Span], devices: Sequence[Device]) -> list[float]:
    """Seconds of each span, had no other one shared its devices."""
    events = sorted(
        [(span.start, True, at) for at, span in enumerate(spans)]
        + [(span.end, False, at) for at, span in enumerate(spans)]
    )
    asked = [[device.demand(span.worker) for device in devices] for span in spans]
    loads, running = [0.0] * len(devices), set[int]()
    done, now = [0.0] * len(spans), events[0][0] if events else 0.0
    for time, begins, at in events:
        if time > now:
            for each in running:
                done[each] += (time - now) * speed(asked[each], loads, devices)
            now = time
        (running.add if begins else running.discard)(at)
        for number, demand in enumerate(asked[at]):
            loads[number] += demand if begins else -demand
    return done


def speed(asked: Sequence[float], loads: Sequence[float], devices: Sequence[Device]) -> float:
    """Share of its full speed at which a process runs, the least that its devices allow."""
    return min(
        (
            min(1.0, device.capacity / load)
            for demand, load, device in zip(asked, loads, devices)
            if demand and load > 0
        ),
        default=1.0,
    )


def spans_of(path: Path) -> Iterator[list[Span]]:
    """The working spans of each iteration of a trace, in order.

    Raises:
        DataError: the file cannot be read.
    """
    names, found = dict[int, str](), list[Span]()
    for event in _events(path):
        kind = event["ph"]
        if kind == "M":
            names[event["tid"]] = str(event["args"]["name"]).partition(" ")[0]
        elif kind == "X":
            start = event["ts"] / 1e6
            name = names.get(event["tid"], DRIVER)
            span = Span(name, str(event["name"]), start, start + event["dur"] / 1e6)
            if works(span) and span.phase not in HISTORY:
                found.append(span)
        elif kind == "C":  # the recorder ends an iteration with it
            yield found
            found = []


def _events(path: Path) -> Iterable[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if line.strip(b" ,\r\n[]") == b"":
            continue
        try:
            event = json.loads(line.strip().rstrip(b","))
            event["ph"], event["name"]
        except MALFORMED as error:
            if number == len(lines):  # cut short by a kill
                return
            raise DataError(f"{path}, line {number}: expected an event, found {line!r}") from error
        yield event
