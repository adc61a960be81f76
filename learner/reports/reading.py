"""Everything that the report shows of a run, read from its directory alone.

Damaged or missing files become notes on the page (`RunData.problems`), not errors: a killed run, or
one of an earlier version, has a report too.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import TesseraError
from cluster.io.run_layout import CONFIG, STARTS
from cluster.io.starts import END, EVENT, HOW, START, read_events
from cluster.io.strict_json import MALFORMED
from cluster.program.invocation import command_of
from cluster.program.streams import printable
from learner.config import RunConfig
from learner.runs.config_file import SHA256
from learner.runs.records import ITERATION, STEP
from learner.runs.run_dir import RunDirectory

Row = dict[str, Any]
NOTE = re.compile(r"\S+ \S+ (?P<level>[A-Z]+) (?P<module>[\w.]+): (?P<text>.*)", re.DOTALL)
"""A line of run.log, after `cluster.program.logs.LINE`."""
WARNINGS = ("WARNING", "ERROR", "CRITICAL")
MOST_NOTES = 200
LARGEST_TEXT = 1 << 20
"""Bytes of a configuration, or of the end of a log, that are read at most."""


@dataclass(frozen=True)
class RunData:
    """What the files of a run hold."""

    run: RunDirectory
    config: dict[str, Any]
    """As nested plain values; empty if it cannot be read."""
    config_text: str
    settings: RunConfig | None
    """The same, validated; None if this version does not accept it."""
    metrics: list[Row]
    evaluations: list[Row]
    """While training."""
    table: dict[str, dict[str, float]]
    """Final evaluation: name of a policy -> figures."""
    events: list[Row]
    """Starts and ends (`cluster.io.starts`)."""
    notes: list[tuple[str, str, str]]
    """Warnings and errors of the log: time, level, text."""
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return printable(self.run.path.name)

    @property
    def done(self) -> int:
        """Iterations done."""
        return int(self.iterations[-1]) if self.metrics else 0

    @property
    def iterations(self) -> list[float]:
        """Numbers of the records' iterations, from 1 (early versions counted from 0)."""
        numbers = [float(row[ITERATION]) for row in self.metrics]
        first = 1.0 if numbers and numbers[0] == 0 else 0.0
        return [number + first for number in numbers]

    @property
    def planned(self) -> int:
        """Iterations of the configuration; 0 if it is not known."""
        found = self.config.get("iterations")
        return found if isinstance(found, int) else 0

    @property
    def starts(self) -> list[Row]:
        return [event for event in self.events if event[EVENT] == START]

    def column(self, metric: str) -> list[float]:
        """Values of a metric by iteration; NaN where not measured, or not finite."""
        return [plain_number(row.get(metric)) for row in self.metrics]

    def names(self, prefix: str) -> list[str]:
        """Metrics with a prefix, without it, in the order of the records."""
        keys = dict.fromkeys(key for row in self.metrics for key in row)
        return [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]

    def setting(self, path: str) -> Any:
        """A value of the configuration by its dotted name; None if there is none."""
        found: Any = self.config
        for part in path.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found


def plain_number(value: Any) -> float:
    """A number of a record; NaN for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return math.nan


def read_run(run: RunDirectory) -> RunData:
    """Read a run's files."""
    problems: list[str] = []
    config, text, settings = _config(run, problems)
    metrics = _records(run.metrics, ITERATION, problems)
    evaluations = _records(run.evaluations, STEP, problems)
    return RunData(
        run=run,
        config=config,
        config_text=text,
        settings=settings,
        metrics=metrics,
        evaluations=evaluations,
        table=_table(run.evaluation, problems),
        events=read_events(run.path),
        notes=_notes(run.log, problems),
        problems=problems,
    )


def state_of(data: RunData, owner: str) -> tuple[str, str]:
    """How a run is, in a word, and a sentence about it.

    Args:
        owner: the process that is writing the run's directory; empty: none.
    """
    done = f"{data.done} of {data.planned or '?'} iterations done"
    last = data.events[-1] if data.events else None
    if last is not None and last[EVENT] == END:
        how, detail = str(last.get(HOW, "")), str(last.get("detail", ""))
        if how == "failed":
            return "failed", f"{done}; {detail}" if detail else done
        return ("finished" if how == "finished" else "stopped"), done
    if owner:
        return "running", f"{done}; {owner}"
    if last is not None:
        return "killed", f"{done}; its end was not recorded: it was killed, or its machine was lost"
    if data.planned and data.done >= data.planned and "tuned" in data.table:
        return "finished", done
    return "incomplete", f"{done}; {STARTS} is missing, so how it ended is not known"


def time_of(event: Row) -> datetime | None:
    """When a start or end was; UTC where it names no zone."""
    try:
        time = datetime.fromisoformat(str(event.get("time")))
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def times_of(data: RunData) -> tuple[datetime | None, float]:
    """First start, and seconds from each start to its end, added up; of runs without a record of
    their starts, None and the seconds of their iterations."""
    total, since, first = 0.0, None, None
    for event in data.events:
        if (time := time_of(event)) is None:
            continue
        if event[EVENT] == START:
            first, since = first or time, time
        elif since is not None:
            total, since = total + (time - since).total_seconds(), None
    if not total:
        total = math.fsum(s for s in data.column("time/iteration") if math.isfinite(s))
    return first, total


def command_to_repeat(run: RunData) -> str:
    """The command that repeats a run in a new directory: its first one, or that with its
    configuration as preset where the first one is a resume, or not known."""
    config = shlex.quote(printable(run.run.path / CONFIG))
    otherwise = f"{command_of('learner.run')} --preset {config}"
    given = run.starts[0].get("command") if run.starts else None
    if not isinstance(given, str) or run.starts[0].get("resumed"):
        return otherwise
    try:
        words = shlex.split(given)
    except ValueError:  # cut short
        return otherwise
    names = [word.partition("=")[0].replace("_", "-") for word in words]
    if "--resume" in names:
        return otherwise
    kept = [
        word
        for at, word in enumerate(words)
        if names[at] not in ("--run-dir", "--auto-resume")
        and not (at and words[at - 1].replace("_", "-") == "--run-dir")
    ]
    return printable(shlex.join(kept) if len(kept) < len(words) else given)


def hardware_lines(run: RunData) -> list[str]:
    """Machine and workers of the newest start."""
    found = run.starts[-1].get("hardware") if run.starts else None
    fleet = run.starts[-1].get("fleet") if run.starts else None
    lines = []
    if isinstance(found, dict):
        gpus = found.get("gpus") or []
        kinds = ", ".join(f"{gpus.count(kind)} × {kind}" for kind in dict.fromkeys(gpus))
        lines.append(
            f"{found.get('host')}: {found.get('cpu')}, {found.get('cores')} cores, "
            f"{found.get('memory_gb')} GB, {kinds or 'no GPU'}"
        )
        if isinstance(found.get("hosts"), int) and found["hosts"] > 1:
            lines.append(
                f"cluster of {found['hosts']} hosts: {found.get('cluster_cpus'):g} CPUs, "
                f"{found.get('cluster_gpus'):g} GPUs"
            )
    if isinstance(fleet, dict):
        if fleet.get("inline"):
            lines.append("all roles in one process (--inline)")
        else:
            roles = [f"{count} × {role}" for role, count in fleet.items() if role != "inline"]
            lines.append(", ".join(roles))
    return [printable(line) for line in lines]


def _config(run: RunDirectory, problems: list[str]) -> tuple[dict[str, Any], str, RunConfig | None]:
    text = _text(run.config, problems, "the configuration, and what depends on it, is missing")
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # a date that is none
        problems.append(f"{run.config.name} cannot be read as YAML: {error}")
        found = None
    settings = None
    try:
        settings = run.read_config() if text else None
    except (TesseraError, ValueError) as error:
        problems.append(str(error))
    shown = [line for line in text.splitlines() if not line.startswith(SHA256)]
    return found if isinstance(found, dict) else {}, "\n".join(shown), settings


def _text(path: Path, problems: list[str], lost: str = "") -> str:
    try:
        with path.open("rb") as file:
            return file.read(LARGEST_TEXT).decode("utf-8", "replace")
    except OSError as error:
        if lost:
            problems.append(f"{path.name} cannot be read ({error.strerror}): {lost}")
        return ""


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _records(path: Path, key: str, problems: list[str]) -> list[Row]:
    """Rows with a number in `key`. A last line that is cut short is not a problem: the run may be
    active."""
    if not path.is_file():
        return []
    rows, bad, last = list[Row](), 0, False
    try:
        for line in _lines(path):
            last = False
            try:
                row = json.loads(line)
            except MALFORMED:
                row = None
            if isinstance(row, dict) and math.isfinite(plain_number(row.get(key))):
                rows.append(row)
            elif line.strip():
                bad, last = bad + 1, not line.endswith(b"\n")
    except OSError as error:
        problems.append(f"{path.name} cannot be read to its end: {error.strerror}")
    if bad - last:
        problems.append(f"{path.name}: {bad - last} damaged lines are left out")
    return rows


def _table(path: Path, problems: list[str]) -> dict[str, dict[str, float]]:
    if not path.is_file():
        return {}
    try:
        rows = json.loads(path.read_bytes())
        return {
            printable(name): {key: plain_number(value) for key, value in figures.items()}
            for name, figures in rows.items()
        }
    except (OSError, *MALFORMED) as error:
        problems.append(f"{path.name} is damaged: {error}")
        return {}


def _notes(path: Path, problems: list[str]) -> list[tuple[str, str, str]]:
    """Warnings, errors and notes of the newest part of a log."""
    if not path.is_file():
        return []
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(size - LARGEST_TEXT, 0))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
        return []
    found = []
    for line in lines:
        match = NOTE.fullmatch(line)
        if match is None:
            continue
        level, text = match["level"], match["text"]
        if level in WARNINGS or text.startswith("note: "):
            found.append((line[:19], level.lower(), text.removeprefix("note: ")))
    return found[-MOST_NOTES:]


def differing(configs: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Dotted names of settings that are not equal in all runs -> run -> value."""
    flat = {run: dict(_flat(config)) for run, config in configs.items()}
    names = dict.fromkeys(name for values in flat.values() for name in values)
    found = {}
    for name in names:
        values = {run: settings.get(name) for run, settings in flat.items()}
        if len({repr(value) for value in values.values()}) > 1:
            found[name] = values
    return found


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _flat(part, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
