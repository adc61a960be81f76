"""The timeline of the report: which role works when, from trace.json of any length.

The whole run as a map of busy shares (role by time), the last iterations phase by phase, and the
curves of idle shares.
"""

from __future__ import annotations

import itertools
import json
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster.io.strict_json import MALFORMED
from cluster.spans import DRIVER, QUEUE, role_of
from learner.reports.charts import Chart, Figure, Line, rounded, shown_text

BINS = 120  # of time, in the map
MOST_SPANS = 1500  # drawn phase by phase
SHOWN_ITERATIONS = 3
ROW = 26  # pixels
IDLE_KINDS = ("wait_", QUEUE, "broadcast")
"""Phases in which a worker waits, or others work meanwhile (`cluster.spans.works`)."""
PHASE_COLOURS = {"sample": 1, "decode": 6, "score": 2, "moments": 5, "decompose": 5, "learn": 3,
                 "pack": 4}  # fmt: skip
"""Numbers of series colours; other phases are grey."""


@dataclass
class Trace:
    """Spans of a trace, as columns; times in microseconds."""

    rows: list[str] = field(default_factory=list)
    """Worker, and phase where it has a row of its own."""
    phases: list[str] = field(default_factory=list)
    row: array = field(default_factory=lambda: array("l"))
    phase: array = field(default_factory=lambda: array("l"))
    start: array = field(default_factory=lambda: array("q"))
    length: array = field(default_factory=lambda: array("q"))
    idle: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """Idle share of each role, at the end of each iteration."""
    iterations: list[int] = field(default_factory=list)
    """Number of each iteration; 0 in traces of versions that did not say it."""
    cut: bool = False
    """Only the end of the file was read."""


def read_trace(path: Path, problems: list[str], largest: int) -> Trace:
    """Read trace.json; also of a killed run.

    Args:
        largest: bytes that are read from its end; of a larger file also the first ones, for names.
    """
    trace = Trace()
    if not path.is_file():
        return trace
    names: dict[int, str] = {}
    rows: dict[str, int] = {}
    phases: dict[str, int] = {}
    bad = 0
    try:
        for event in _events(path, trace, largest):
            if event is None:
                bad += 1
                continue
            try:
                _add(trace, event, names, rows, phases)
            except (*MALFORMED, OverflowError):
                bad += 1
    except OSError as error:
        problems.append(f"{path.name} cannot be read to its end: {error.strerror}")
    if bad > 1:  # the last line may be cut short
        problems.append(f"{path.name}: {bad} damaged events are left out")
    trace.rows, trace.phases = list(rows), list(phases)
    return trace


def _events(path: Path, trace: Trace, largest: int) -> Iterator[dict[str, Any] | None]:
    """Events, one a line; None for a damaged one. Of a very large file, its end, and the names of
    threads at its start."""
    size = path.stat().st_size
    trace.cut = size > largest
    with path.open("rb") as file:
        if trace.cut:
            for line in file.readlines(largest):
                if b"thread_name" in line:
                    yield _event(line)
            file.seek(max(size - largest, file.tell()))
            file.readline()  # the rest of a line
        for line in file:
            if line.strip().rstrip(b",") not in (b"", b"[", b"]", b"[]"):
                yield _event(line)


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line.strip().rstrip(b","))
    except MALFORMED:
        return None
    return found if isinstance(found, dict) else None


def _add(
    trace: Trace,
    event: dict[str, Any],
    names: dict[int, str],
    rows: dict[str, int],
    phases: dict[str, int],
) -> None:
    kind = event["ph"]
    if kind == "M":
        names[event["tid"]] = str(event["args"]["name"])
    elif kind == "C":
        shares = {str(role): float(share) for role, share in event["args"].items()}
        number = int(event.get("iteration", 0))
        trace.idle.append((int(event["ts"]), shares))
        trace.iterations.append(number)
    elif kind == "X" and not (trace.cut and event["tid"] not in names):
        name, phase = names[event["tid"]], str(event["name"])
        start, length = int(event["ts"]), int(event["dur"])
        trace.start.append(start)
        trace.length.append(max(length, 0))
        trace.row.append(rows.setdefault(name, len(rows)))
        trace.phase.append(phases.setdefault(phase, len(phases)))


def worker_of(row: str) -> str:
    """'sampler-0 decode' -> sampler-0"""
    return row.partition(" ")[0]


def is_work(phase: str) -> bool:
    return not phase.startswith(IDLE_KINDS)


def busy_map(trace: Trace, starts: Sequence[int] = ()) -> Figure | None:
    """Busy share of each role over the whole run, without the time between its starts: a heat map.

    Args:
        starts: times of the run's starts, microseconds.
    """
    works = np.array([is_work(phase) for phase in trace.phases], bool)
    work = works[np.asarray(trace.phase, np.int64)] if len(trace.start) else works[:0]
    if not work.any() or not trace.idle:
        return None
    marks = np.array([at for at, _ in trace.idle])
    begin = np.asarray(trace.start, np.int64)
    end = begin + np.asarray(trace.length, np.int64)
    first = int(marks[0]) if len(marks) > 1 else int(begin[work].min())
    pieces = _pieces(first, marks, begin, starts)
    row_workers = [worker_of(row) for row in trace.rows]
    workers = sorted(set(row_workers))
    of_row = np.array([workers.index(worker) for worker in row_workers])
    of_span = of_row[np.asarray(trace.row, np.int64)]
    total = sum(until - since for since, until in pieces)
    edges = np.linspace(0, total, BINS + 1)
    roles: dict[str, list[np.ndarray]] = {}
    for number, worker in enumerate(workers):
        chosen = work & (of_span == number)
        cover = _busy(_working(begin[chosen], pieces), _working(end[chosen], pieces), edges)
        roles.setdefault(role_of(worker), []).append(cover)
    shares = {role: np.mean(each, axis=0) / edges[1] * 100 for role, each in roles.items()}
    return _heat_map(shares, roles, (edges[:-1] + edges[1:]) / 2 / 6e7)


def _pieces(
    first: int, marks: np.ndarray, begin: np.ndarray, starts: Sequence[int]
) -> list[tuple[int, int]]:
    """Since when and until when each start of a run worked, from its first span to the end of its
    last iteration."""
    pieces, bounds = [], [first, *sorted(at for at in starts if first < at), math.inf]
    for low, high in itertools.pairwise(bounds):
        own = marks[(marks >= low) & (marks < high)]
        spans = begin[(begin >= low) & (begin < high)]
        since = first if low == first else int(spans.min()) if spans.size else None
        if own.size and since is not None and own.max() > since:
            pieces.append((since, int(own.max())))
    return pieces or [(first, max(int(marks[-1]), first + 1))]


def _working(times: np.ndarray, pieces: list[tuple[int, int]]) -> np.ndarray:
    """Times as microseconds of work: what lies between pieces counts nothing."""
    return sum(
        (np.clip(times, since, until) - since for since, until in pieces),
        np.zeros(len(times), np.int64),
    )


def _busy(begin: np.ndarray, end: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Time within each bin that spans cover; where they overlap, once."""
    if not begin.size:
        return np.zeros(len(edges) - 1)
    order = np.argsort(begin, kind="stable")
    begin, end = begin[order], end[order]
    reached = np.maximum.accumulate(end)
    begin = np.maximum(begin, np.concatenate([begin[:1], reached[:-1]]))
    end = np.maximum(end, begin)
    covered = np.cumsum(end - begin)
    points = np.stack([begin, end], axis=1).ravel()
    until = np.stack([covered - (end - begin), covered], axis=1).ravel()
    return np.diff(np.interp(edges, points, until))


def _heat_map(
    shares: dict[str, np.ndarray], roles: dict[str, list[np.ndarray]], minutes: np.ndarray
) -> Figure:
    order = sorted(shares, key=lambda role: float(shares[role].mean()))
    trace_of = {
        "type": "heatmap",
        "x": rounded(minutes.tolist()),
        "y": [f"{shown_text(role)} × {len(roles[role])}" for role in order],
        "z": [[round(float(v), 1) for v in shares[role]] for role in order],
        "zmin": 0,
        "zmax": 100,
        "colorscale": [[0, "var(--heat0)"], [1, "var(--heat1)"]],
        "colorbar": {"title": {"text": "busy %", "side": "right"}, "thickness": 10},
        "hovertemplate": "%{y}, minute %{x:.2f}: busy %{z:.0f} %<extra></extra>",
    }
    layout = _layout(len(order), "minutes of work since the first iteration")
    return {"data": [trace_of], "layout": layout}


def last_iterations(trace: Trace, starts: Sequence[int] = ()) -> tuple[Figure | None, int]:
    """Phases of every worker in the last iterations, as bars over time; and how many iterations.
    Fewer where their spans would be too many, or were begun by another start.

    Args:
        starts: times of the run's starts, microseconds.
    """
    end = trace.idle[-1][0] if trace.idle else 0
    newest = max((at for at in starts if at < end), default=0)
    marks = [at for at, _ in trace.idle if at >= newest]
    if newest and (own := [at for at in trace.start if at >= newest]):
        marks = [min(own), *marks]  # the first iteration since the start has no mark before it
    for count in range(min(SHOWN_ITERATIONS, len(marks) - 1), 0, -1):
        since, until = marks[-count - 1], marks[-1]
        inside = [
            at
            for at, (start, length) in enumerate(zip(trace.start, trace.length))
            if start >= since and start + length <= until
        ]
        if inside and (len(inside) <= MOST_SPANS or count == 1):
            # the longest ones: the others would not be seen
            inside = sorted(inside, key=lambda at: -trace.length[at])[:MOST_SPANS]
            return _bars(trace, inside, since), count
    return None, 0


def _bars(trace: Trace, inside: list[int], since: int) -> Figure:
    rows = sorted({trace.rows[trace.row[at]] for at in inside}, key=_place, reverse=True)
    phases = sorted({trace.phases[trace.phase[at]] for at in inside}, key=_order)
    traces = []
    for phase in phases:
        chosen = sorted(at for at in inside if trace.phases[trace.phase[at]] == phase)
        number = PHASE_COLOURS.get(phase)
        plain = "var(--muted)" if is_work(phase) else "var(--wait)"
        colour = f"var(--c{number})" if number else plain
        traces.append(
            {"type": "bar", "orientation": "h", "name": shown_text(phase.replace("_", " ")),
             "y": [shown_text(trace.rows[trace.row[at]]) for at in chosen],
             "x": rounded([trace.length[at] / 1e6 for at in chosen]),
             "base": rounded([(trace.start[at] - since) / 1e6 for at in chosen]),
             "marker": {"color": colour, "line": {"width": 0}},
             "hovertemplate": "%{y}: " + shown_text(phase) + ", %{x:.4~g} s<extra></extra>"}
        )  # fmt: skip
    layout = _layout(len(rows), "seconds")
    layout["yaxis"] |= {"categoryorder": "array", "categoryarray": [shown_text(r) for r in rows]}
    layout |= {"barmode": "overlay", "showlegend": True, "hovermode": "closest",
               "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}}  # fmt: skip
    layout["margin"]["t"] = 56
    layout["height"] += 50
    return {"data": traces, "layout": layout}


def _order(phase: str) -> tuple[bool, int, str]:
    known = list(PHASE_COLOURS)
    return not is_work(phase), known.index(phase) if phase in known else len(known), phase


def _place(row: str) -> tuple[int, str]:
    order = ("sampler", "reward", "moments", "learner", DRIVER)
    found = next((at for at, word in enumerate(order) if row.startswith(word)), len(order))
    return found, row


def _layout(rows: int, x_title: str) -> dict[str, Any]:
    return {
        "height": 70 + ROW * max(rows, 2),
        "margin": {"l": 10, "r": 10, "t": 8, "b": 40},
        "xaxis": {"title": {"text": x_title, "standoff": 6}, "automargin": True},
        "yaxis": {"automargin": True, "showgrid": False, "fixedrange": True},
        "showlegend": False,
    }


def idle_chart(trace: Trace, iterations: list[float]) -> Chart | None:
    """Idle share of each role so far, by iteration."""
    points = trace.idle[-len(iterations) :] if iterations else []
    x = iterations[-len(points) :]
    if trace.iterations and all(trace.iterations):  # of undone iterations, the repetition
        newest = dict(zip(trace.iterations, trace.idle))
        x = [number for number in iterations if number in newest]
        points = [newest[int(number)] for number in x]
    roles = sorted({role for _, shares in points for role in shares})
    if not roles:
        return None
    lines = [
        Line(role, x, [100 * shares.get(role, math.nan) for _, shares in points], number)
        for number, role in enumerate(roles, 1)
    ]
    return Chart("idle", "Idle share of each role", "% of its workers' time, since the start",
                 "The least idle role is the bottleneck; in one process (--inline) roles take "
                 "turns.", lines)  # fmt: skip
