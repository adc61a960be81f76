"""The page of one run, or of several side by side: sections as data, put into the template.

One file without any other: the chart library (compressed), data and images are inside, and a
content security policy forbids requests.
"""

from __future__ import annotations

import base64
import functools
import gzip
import importlib.resources
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import jinja2
import markupsafe

from cluster.control.discovery import resume_command
from cluster.io.locks import owner_of
from cluster.io.starts import END, EVENT, HOW
from cluster.io.strict_json import MALFORMED, dumps
from cluster.program.streams import printable
from learner.monitoring.timeline import RoleUse, bottleneck
from learner.reports import extremes, images, panels, summary, timeline
from learner.reports.charts import MOST_POINTS, Chart, Figure, points_per_mean
from learner.reports.reading import (
    RunData,
    command_to_repeat,
    differing,
    hardware_lines,
    plain_number,
    read_run,
    state_of,
    time_of,
    times_of,
)
from learner.runs.run_dir import RunDirectory
from rewards.metrics.figures import BETTER

LARGEST = 10_000_000
"""Bytes of a page."""
TEXT = 1_500_000
"""Bytes of data and text, about, while the shares of images are divided."""
MARGIN = 20_000
"""Bytes kept free for notes on damaged galleries."""
SHARES = {"extremes": 0.25, "nearest": 0.1}
"""Of the bytes for images; galleries have what is left."""
LONGEST_CONFIG = 60_000  # characters
LONGEST_NOTE = 600
FOLDER = "templates"
NO_VERDICT = summary.Verdict("The evaluation cannot be read", [], [], "")
NO_TIMELINE: dict[str, Any] = {"map": "", "last": "", "count": 0, "idle": [], "cut": False,
                               "bottleneck": ""}  # fmt: skip


@dataclass(frozen=True)
class Plots:
    """Figures of the page by key, collected while its sections are made."""

    figures: dict[str, Figure]

    def add(self, prefix: str, charts: Sequence[Chart]) -> list[dict[str, str]]:
        """Cards of charts for the template."""
        return [self.card(f"{prefix}-{chart.key}", chart) for chart in charts]

    def card(self, key: str, chart: Chart) -> dict[str, str]:
        key = printable(key)  # as in the template's attributes
        if key in self.figures:
            key = f"{key}-{len(self.figures)}"
        self.figures[key] = chart.figure()
        return {"key": key, "title": printable(chart.title), "unit": chart.unit,
                "note": printable(chart.note)}  # fmt: skip


def render(directories: Sequence[RunDirectory], decoding: extremes.Decoding) -> str:
    """The HTML of a page about runs.

    Args:
        decoding: of rollouts' images, and how much of a trace is read.
    """
    runs = [read_run(directory) for directory in directories]
    plots = Plots({})
    several = len(runs) > 1
    room = max(LARGEST - len(library()) - TEXT, 0.0)
    sections = [_run_section(run, plots, room, decoding, several) for run in runs]
    topics = panels.topics(runs)
    main, others = panels.evaluation_charts(runs, BETTER)
    shared = {
        "topics": [
            {"name": topic.name, "about": topic.about, "constant": topic.constant,
             "missing": topic.missing, "cards": plots.add("curve", topic.charts)}
            for topic in topics
        ],
        "averaged": points_per_mean(max(len(run.metrics) for run in runs), MOST_POINTS),
        "evaluations": plots.add("evaluation", main),
        "spaces": [
            {"name": name, "cards": plots.add("evaluation", charts)}
            for name, charts in others.items()
        ],
        "table": _table(runs),
        "differences": _differences(runs) if several else [],
    }  # fmt: skip
    return _with_galleries(runs, sections, plots, shared)


def _with_galleries(
    runs: Sequence[RunData],
    sections: Sequence[dict[str, Any]],
    plots: Plots,
    shared: dict[str, Any],
) -> str:
    """The page with as much of the galleries as fits beside everything else."""

    def filled(sheets: Sequence[list[dict[str, Any]]]) -> str:
        galleries = [
            {"run": each["name"], "sheets": [*own, *each["nearest_sheets"]]}
            for each, own in zip(sections, sheets)
        ]
        for each, own in zip(sections, problems):
            each["problems"] = [printable(problem) for problem in own]
        return _fill(
            title=" · ".join(each["name"] for each in sections),
            several=len(runs) > 1,
            runs=sections,
            run=sections[0],
            shared=shared,
            galleries=any(sheets),
            data=embedded({"figures": plots.figures, "galleries": galleries}),
        )

    known = [list(each["problems"]) for each in sections]
    problems = known
    left = LARGEST - len(filled([[] for _ in runs]).encode()) - MARGIN
    for share in (1.0, 0.7, 0.4):
        problems = [list(each) for each in known]
        sheets = [
            images.encoded_sheets(each["sheets"], max(share * left, 0) / len(runs), own)
            for each, own in zip(sections, problems)
        ]
        page = filled(sheets)
        if len(page.encode()) <= LARGEST:
            return page
    problems = [[*each, "no room for galleries on this page"] for each in known]
    return filled([[] for _ in runs])


def _fill(**values: Any) -> str:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["printable"] = printable
    template = environment.from_string(_file("report.html"))
    inside = {
        "style": markupsafe.Markup(_file("report.css")),
        "script": markupsafe.Markup(_file("report.js")),
        "library": markupsafe.Markup(library()),
    }
    return printable(template.render(**values, **inside))


def _file(name: str) -> str:
    place = importlib.resources.files("learner").joinpath(FOLDER, name)
    return place.read_text(encoding="utf-8")


@functools.cache
def library() -> str:
    """Plotly's script, gzip and base64: 2 MB instead of 5."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def embedded(value: Any) -> markupsafe.Markup:
    """JSON inside a script element: no character that could end the element."""
    text = dumps(value, separators=(",", ":"), ensure_ascii=True)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return markupsafe.Markup(text)


def _tried(what: str, make: Callable[[], Any], otherwise: Any, problems: list[str]) -> Any:
    """A part of the page; where odd data makes it fail, a problem instead of no page at all."""
    try:
        return make()
    except Exception as error:
        problems.append(f"{what}: cannot be shown ({type(error).__name__}: {error})")
        return otherwise


def _run_section(
    run: RunData, plots: Plots, room: float, decoding: extremes.Decoding, several: bool
) -> dict[str, Any]:
    """What is shown of one run alone."""
    problems = list(run.problems)
    state, sentence = state_of(run, owner_of(run.run.path))
    first, seconds = times_of(run)
    sheets = images.gallery_sheets(run.run.gallery, run.done or run.planned, problems)
    section: dict[str, Any] = {
        "name": run.name,
        "path": printable(run.run.path),
        "state": state,
        "sentence": sentence,
        "started": first.strftime("%Y-%m-%d %H:%M UTC") if first else "",
        "seconds": str(timedelta(seconds=round(seconds))) if seconds else "",
        "facts": _facts(run),
        "command": command_to_repeat(run),
        "resume": "" if state in ("finished", "running") else resume_command(run.run.path),
        "best": _best(run, problems),
        "starts": _tried("starts and ends", lambda: _starts(run), [], problems),
        "versions": _last(run, "versions"),
        "hardware": _tried("hardware", lambda: hardware_lines(run), [], problems),
        "config": printable(run.config_text[:LONGEST_CONFIG]),
        "real_images": printable(run.setting("evaluation.images") or ""),
        "verdict": _tried("result", lambda: summary.verdict(run, BETTER), NO_VERDICT, problems),
        "indicators": _tried("signs", lambda: summary.indicators(run), [], problems),
        "sheets": sheets,
    }
    section |= {"timeline": None, "extremes": None, "extremes_note": "", "nearest": None}
    if not several:
        section |= _of_one(run, plots, room, decoding, problems)
    near = section["nearest"]
    section["nearest_sheets"] = [near | {"step": -1}] if near else []
    section["notes"] = _repeated(run.notes)
    section["problems"] = problems
    return section


def _of_one(
    run: RunData, plots: Plots, room: float, decoding: extremes.Decoding, problems: list[str]
) -> dict[str, Any]:
    """What only the page of one run shows."""
    best, note = _tried(
        "best and worst images",
        lambda: extremes.section(run, decoding, SHARES["extremes"] * room),
        (None, "see the log"),
        problems,
    )
    return {
        "timeline": _tried(
            "timeline",
            lambda: _timeline(run, plots, decoding.trace_bytes, problems),
            NO_TIMELINE,
            problems,
        ),
        "extremes": best,
        "extremes_note": note,
        "nearest": images.nearest_sheet(run.run.gallery, SHARES["nearest"] * room, problems),
    }


def _facts(run: RunData) -> list[str]:
    groups, rollouts = run.setting("groups_per_iteration"), run.setting("rollouts_per_group")
    facts = [f"{run.done} of {run.planned or '?'} iterations"]
    if isinstance(groups, int) and isinstance(rollouts, int):
        facts.append(f"{groups} × {rollouts} images an iteration")
    seed = run.setting("seed")
    return [*facts, f"seed {seed}"] if seed is not None else facts


def _best(run: RunData, problems: list[str]) -> str:
    """The checkpoint that best.json names, and why; empty if there is none."""
    try:
        best = json.loads(run.run.best.read_bytes())
        value = summary.figure_text(plain_number(best["value"]))
        return printable(f"{best['checkpoint']}: {best['figure']} {value}")
    except FileNotFoundError:
        return ""
    except (OSError, *MALFORMED) as error:
        problems.append(f"{run.run.best.name} is damaged: {error}")
        return ""


def _starts(run: RunData) -> list[dict[str, str]]:
    """Every start and end, for a table."""
    return [
        {"time": printable(event.get("time", "")).replace("+00:00", " UTC").replace("T", " "),
         "what": printable(event.get(HOW, "")) if event[EVENT] == END
         else "resumed" if event.get("resumed") else "started",
         "detail": printable(event.get("detail") or event.get("command") or "")[:LONGEST_NOTE]}
        for event in run.events
    ]  # fmt: skip


def _last(run: RunData, key: str) -> dict[str, Any]:
    found = run.starts[-1].get(key) if run.starts else None
    return {printable(k): printable(v) for k, v in found.items()} if isinstance(found, dict) else {}


def _table(runs: Sequence[RunData]) -> dict[str, Any]:
    """Figures as rows, policies of every run as columns."""
    tables = [run.table for run in runs]
    shown = summary.columns(tables, BETTER)
    together = {(at, name): row for at, run in enumerate(runs) for name, row in run.table.items()}
    flat = {f"{at}/{name}": row for (at, name), row in together.items()}
    cells = summary.table_cells(flat, shown)
    spaces = [summary.space_name(column.key) for column in shown]
    counts = {row["images"] for row in flat.values() if row.get("images", 0) > 0}
    return {
        "policies": [
            {"run": runs[at].name, "at": at + 1, "name": name} for at, name in together
        ],
        "runs": [
            {"name": run.name, "at": at + 1, "width": len(run.table)}
            for at, run in enumerate(runs)
            if run.table
        ],
        "rows": [
            {"heading": column.heading, "arrow": column.arrow,
             "meaning": "" if spaces[at] else column.meaning,
             "part": f"the same in {spaces[at]}" if spaces[at] != spaces[max(at - 1, 0)] else "",
             "cells": [row[at] for row in cells.values()]}
            for at, column in enumerate(shown)
        ],
        "images": ", ".join(f"{count:,.0f}" for count in sorted(counts)),
    }  # fmt: skip


def _differences(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    names = [f"{at}/{run.name}" for at, run in enumerate(runs)]
    found = differing({name: run.config for name, run in zip(names, runs)})
    return [
        {"name": printable(setting),
         "values": ["–" if values[name] is None else printable(values[name]) for name in names]}
        for setting, values in found.items()
    ]  # fmt: skip


def _timeline(run: RunData, plots: Plots, trace_bytes: int, problems: list[str]) -> dict[str, Any]:
    trace = timeline.read_trace(run.run.trace, problems, trace_bytes)
    starts = [round(time.timestamp() * 1e6) for event in run.starts if (time := time_of(event))]
    found = {**NO_TIMELINE, "cut": trace.cut}
    if figure := timeline.busy_map(trace, starts):
        plots.figures["timeline-map"], found["map"] = figure, "timeline-map"
    figure, found["count"] = timeline.last_iterations(trace, starts)
    if figure:
        plots.figures["timeline-last"], found["last"] = figure, "timeline-last"
    if chart := timeline.idle_chart(trace, run.iterations):
        found["idle"] = [plots.card("timeline-idle", chart)]
    found["bottleneck"] = _bottleneck(run, trace)
    return found


def _bottleneck(run: RunData, trace: timeline.Trace) -> str:
    if not trace.idle:
        return ""
    workers = {timeline.worker_of(row) for row in trace.rows}
    uses = [
        RoleUse(role, max(sum(timeline.role_of(w) == role for w in workers), 1), 1 - idle)
        for role, idle in trace.idle[-1][1].items()
    ]
    fleet = run.starts[-1].get("fleet") if run.starts else None
    inline = isinstance(fleet, dict) and bool(fleet.get("inline"))
    staleness = run.setting("max_staleness")
    return bottleneck(uses, staleness if isinstance(staleness, int) else 0, inline=inline)


def _repeated(notes: Sequence[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """Notes of the log, equal ones once with their number."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for time, level, text in notes:
        text = printable(text)[:LONGEST_NOTE]
        entry = found.setdefault(
            (level, text), {"time": time, "level": level, "text": text, "count": 0}
        )
        entry["count"] += 1
    return list(found.values())
