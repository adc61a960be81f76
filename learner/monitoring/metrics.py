"""What an iteration leaves behind: a line of metrics, TensorBoard events, rollouts, spans."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.io.files import replacing, writing
from cluster.io.strict_json import dumps
from cluster.messages import ScoredGroup
from cluster.spans import QUEUE, Span
from learner.grpo.advantage import Advantages
from learner.monitoring.rows import staleness_of
from learner.monitoring.timeline import Usage
from learner.rollouts.parquet import rollout_table, write_rollouts
from learner.runs.records import ITERATION, STEP, counted_from, read_rows, rollout_file, truncate
from learner.runs.run_dir import RunDirectory

UNREPEATABLE = ("time/", "fleet/")
"""Prefixes of metrics that differ between equal runs."""
EVALUATION_TAGS = ("evaluation", "exam")
"""TensorBoard prefixes of evaluations; "evaluation", the old name, is written until version 0.3."""
OVERLAPPING = (QUEUE, "decode")
"""Phases with a row of their own in the trace: what waits in a worker overlaps with what it does,
and images are decoded while the next group's tokens are."""


class Recorder:
    """Appends to a run's files. `done` is how many iterations there are before: what an
    interrupted run wrote after them is dropped, so that no row is doubled.

    Every method raises StorageError where there is no room.
    """

    def __init__(self, run: RunDirectory, done: int, *, rollouts: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run, self._rollouts = run, rollouts
        self._base = counted_from(run)  # before rows are cut: the run keeps to it
        truncate(run, done, rollouts=rollouts)
        with writing(run.metrics):
            self._metrics = run.metrics.open("a", buffering=1)
        with writing(run.tensorboard):
            purge = done + self._base if any(run.tensorboard.iterdir()) else None
            self._events = SummaryWriter(str(run.tensorboard), purge_step=purge)
        self._trace = Trace(run.trace, resume=done > 0)
        self.usage = Usage(time.time())
        """How much each role worked since now."""

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """While the block writes one of the run's files, which must still be this process's."""
        self._run.check_owned()
        with writing(path):
            yield

    def record(
        self,
        row: dict[str, Any],
        groups: Sequence[ScoredGroup],
        advantages: Advantages,
        spans: Iterable[Span],
    ) -> None:
        """Everything of one iteration."""
        iteration = row[ITERATION] - 1 + self._base
        if self._rollouts:  # before its row: a row has its rollouts
            moments = row.get("moments/version", 0)
            table = rollout_table(iteration, groups, advantages, moments)
            self._run.check_owned()
            write_rollouts(rollout_file(self._run, iteration), table)
        with self._writing(self._run.metrics):
            self._metrics.write(dumps({**row, ITERATION: iteration}) + "\n")
        with self._writing(self._run.tensorboard):
            self._scalars({**row, ITERATION: iteration}, iteration)
            self._histograms(advantages, iteration)
            if "version" in row:
                ages = staleness_of(groups, row["version"] - 1)
                self._events.add_histogram("staleness/groups", ages, iteration)
        spans = tuple(spans)
        self.usage.add(spans)
        with self._writing(self._run.trace):
            self._trace.add(spans)
            self._trace.idle({use.role: use.idle for use in self.usage.shares()})
            self._trace.flush()

    def record_evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """An evaluation while training, after `step` iterations."""
        append_evaluation(self._run, step, figures)
        with self._writing(self._run.tensorboard):
            for prefix in EVALUATION_TAGS:
                self._scalars({f"{prefix}/{k}": value for k, value in figures.items()}, step)

    def _scalars(self, values: Mapping[str, float | None], step: int) -> None:
        """Points of curves; where there is no number, none."""
        for key, value in values.items():
            if value is not None and math.isfinite(value):
                self._events.add_scalar(key, value, step)

    def _histograms(self, advantages: Advantages, iteration: int) -> None:
        """Raw and normalised rewards, and advantages, of the images that were scored."""
        valid = advantages.valid
        if not valid.any():
            return
        for name, values in advantages.rewards.items():
            self._events.add_histogram(f"rewards/{name}", values[valid], iteration)
            normalised = advantages.normalised[name][valid]
            self._events.add_histogram(f"rewards_normalised/{name}", normalised, iteration)
        self._events.add_histogram("rewards/advantage", advantages.values[valid], iteration)

    def close(self) -> None:
        with writing(self._run.metrics):
            self._metrics.close()
        with writing(self._run.tensorboard):
            self._events.close()
        with writing(self._run.trace):
            self._trace.close(whole=self._run.owned)


def append_evaluation(run: RunDirectory, step: int, figures: Mapping[str, float]) -> None:
    """Append a line to evaluations.jsonl."""
    run.check_owned()
    with writing(run.evaluations), run.evaluations.open("a") as file:
        file.write(dumps({STEP: step, **figures}) + "\n")


class Trace:
    """The timeline, in Chrome's trace format: open it in Perfetto or chrome://tracing.

    One event a line, so that the file of a killed run can still be read and gone on with.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self._rows: dict[str, int] = {}
        self._separator = "[\n"
        events = _trace_events(path) if resume else []
        with writing(path), replacing(path) as partial:
            self._file = partial.open("w")
            for event in events:
                if event["ph"] == "M":
                    self._rows[event["args"]["name"]] = event["tid"]
                self._write(event)
            self._file.flush()

    def add(self, spans: Iterable[Span]) -> None:
        for span in spans:
            apart = span.phase in OVERLAPPING
            name = f"{span.worker} {span.phase}" if apart else span.worker
            row = self._rows.get(name)
            if row is None:
                row = self._rows[name] = len(self._rows) + 1
                label = {"name": "thread_name", "ph": "M", "args": {"name": name}}
                self._write({**label, "pid": 1, "tid": row})
            times = {"ts": round(span.start * 1e6), "dur": round(span.seconds * 1e6)}
            self._write({"name": span.phase, "ph": "X", **times, "pid": 1, "tid": row})

    def idle(self, shares: Mapping[str, float]) -> None:
        """The idle share of every role so far: a curve each, beside the rows."""
        values = {role: round(share, 4) for role, share in shares.items()}
        event = {"name": "idle share", "ph": "C", "ts": round(time.time() * 1e6), "pid": 1}
        self._write({**event, "args": values})

    def flush(self) -> None:
        self._file.flush()

    def close(self, *, whole: bool = True) -> None:
        """whole: with what makes it JSON; not if the file became another process's."""
        if whole:
            self._file.write("\n]\n" if self._separator == ",\n" else "[]\n")
        self._file.close()

    def _write(self, event: dict[str, Any]) -> None:
        self._file.write(self._separator + dumps(event))
        self._separator = ",\n"


def _trace_events(path: Path) -> list[dict[str, Any]]:
    """Events of an earlier process. What it did not write whole is left out."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    events = []
    for line in lines:
        with contextlib.suppress(ValueError):  # cut short, or a bracket
            event = json.loads(line.rstrip(b","))
            if _is_event(event):
                events.append(event)
    return events


def _is_event(event: Any) -> bool:
    if not isinstance(event, dict) or "ph" not in event:
        return False
    if event["ph"] != "M":
        return True
    args = event.get("args")
    return isinstance(args, dict) and "name" in args and type(event.get("tid")) is int


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file. A last line that a crash cut short is left out.

    Raises:
        DataError: another line is not a row.
    """
    return read_rows(path, ITERATION)


def repeatable(row: dict[str, Any]) -> dict[str, Any]:
    """The part of a row that equal runs have in common: no times, no restarts."""
    return {key: value for key, value in row.items() if not key.startswith(UNREPEATABLE)}
