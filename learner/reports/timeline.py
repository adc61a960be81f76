"""The timeline of the report: which role works when, from trace.json of any length.

The whole run as a map of busy shares (role by time), the last iterations phase by phase, and the
curves of idle shares.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster.io.strict_json import MALFORMED
from cluster.spans import DRIVER, QUEUE, role_of
from learner.reports.charts import Chart, Figure, Line, rounded, shown_text

LARGEST = 128 << 20
"""Bytes of a trace that are read, from its end."""
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
    cut: bool = False
    """Only the end of the file was read."""


def read_trace(path: Path, problems: list[str]) -> Trace:
    """Read trace.json; also of a killed run."""
    trace = Trace()
    if not path.is_file():
        return trace
    names: dict[int, str] = {}
    rows: dict[str, int] = {}
    phases: dict[str, int] = {}
    bad = 0
    try:
        for event in _events(path, trace):
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


def _events(path: Path, trace: Trace) -> Iterator[dict[str, Any] | None]:
    """Events, one a line; None for a damaged one. Of a very large file, the names of threads, which
    are spread over it, and its end."""
    size = path.stat().st_size
    trace.cut = size > LARGEST
    with path.open("rb") as file:
        for line in file:
            if trace.cut and size - file.tell() > LARGEST and b"thread_name" not in line:
                continue
            text = line.strip().rstrip(b",")
            if text in (b"", b"[", b"]", b"[]"):
                continue
            try:
                found = json.loads(text)
            except MALFORMED:
                found = None
            yield found if isinstance(found, dict) else None


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
        trace.idle.append((int(event["ts"]), shares))
    elif kind == "X":
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


def busy_map(trace: Trace) -> Figure | None:
    """Busy share of each role over the whole run: a heat map."""
    work = [at for at in range(len(trace.start)) if is_work(trace.phases[trace.phase[at]])]
    if not work or not trace.idle:
        return None
    workers = sorted({worker_of(row) for row in trace.rows})
    first = trace.idle[0][0] if len(trace.idle) > 1 else int(trace.start[work[0]])
    last = max(trace.idle[-1][0], first + 1)
    edges = np.linspace(first, last, BINS + 1)
    busy = {worker: np.zeros(BINS) for worker in workers}
    ends: dict[str, float] = {}
    for at in sorted(work, key=lambda at: trace.start[at]):
        worker = worker_of(trace.rows[trace.row[at]])
        begin = max(float(trace.start[at]), ends.get(worker, -math.inf), float(first))
        end = min(float(trace.start[at] + trace.length[at]), float(last))
        if end > begin:  # overlapping work counts once
            ends[worker] = end
            _spread(busy[worker], edges, begin, end)
    roles: dict[str, list[np.ndarray]] = {}
    for worker in workers:
        roles.setdefault(role_of(worker), []).append(busy[worker])
    width = edges[1] - edges[0]
    shares = {role: np.mean(each, axis=0) / width * 100 for role, each in roles.items()}
    minutes = ((edges[:-1] + edges[1:]) / 2 - first) / 6e7
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
    layout = _layout(len(order), "minutes since the first iteration")
    return {"data": [trace_of], "layout": layout}


def _spread(bins: np.ndarray, edges: np.ndarray, begin: float, end: float) -> None:
    """Add a span's time to the bins that it covers."""
    low = int(np.searchsorted(edges, begin, "right")) - 1
    high = min(int(np.searchsorted(edges, end, "left")), len(bins))
    for at in range(max(low, 0), high):
        bins[at] += min(end, edges[at + 1]) - max(begin, edges[at])


def last_iterations(trace: Trace) -> tuple[Figure | None, int]:
    """Phases of every worker in the last iterations, as bars over time; and how many iterations.
    Fewer where their spans would be too many."""
    marks = [at for at, _ in trace.idle]
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
             "x": rounded([trace.length[at] / 1e3 for at in chosen]),
             "base": rounded([(trace.start[at] - since) / 1e3 for at in chosen]),
             "marker": {"color": colour, "line": {"width": 0}},
             "hovertemplate": "%{y}: " + shown_text(phase) + ", %{x:.1f} ms<extra></extra>"}
        )  # fmt: skip
    layout = _layout(len(rows), "milliseconds")
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
    roles = sorted({role for _, shares in points for role in shares})
    if not roles:
        return None
    x = iterations[-len(points) :]
    lines = [
        Line(role, x, [100 * shares.get(role, math.nan) for _, shares in points], number)
        for number, role in enumerate(roles, 1)
    ]
    return Chart("idle", "Idle share of each role", "% of its workers' time, since the start",
                 "The least idle role is the bottleneck; in one process (--inline) roles take "
                 "turns.", lines)  # fmt: skip
