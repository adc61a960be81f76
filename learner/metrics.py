"""What an iteration leaves behind: a line of metrics, TensorBoard events, rollouts, spans."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DataError
from cluster.messages import ScoredGroup, Span
from learner.advantage import Advantages
from learner.rundir import RunDirectory

UNREPEATABLE = ("time/", "fleet/")
"""Prefixes of metrics that differ between equal runs."""


class Recorder:
    """Appends to a run's files. `first` is the iteration that training begins with: what an
    interrupted run wrote from there on is dropped, so that no row is doubled."""

    def __init__(self, run: RunDirectory, first: int, *, rollouts: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run, self._rollouts = run, rollouts
        _keep_before(run, first)
        self._metrics = run.metrics.open("a", buffering=1)
        self._events = SummaryWriter(str(run.tensorboard), purge_step=first or None)
        self._trace = Trace(run.trace, resume=first > 0)

    def record(
        self,
        row: dict[str, Any],
        groups: Sequence[ScoredGroup],
        advantages: Advantages,
        spans: Iterable[Span],
    ) -> None:
        """Everything of one iteration."""
        iteration = row["iteration"]
        self._metrics.write(json.dumps(row) + "\n")
        for key, value in row.items():
            self._events.add_scalar(key, value, iteration)
        self._histograms(advantages, iteration)
        if self._rollouts:
            table = rollout_table(iteration, groups, advantages)
            pq.write_table(table, rollout_file(self._run, iteration), compression="zstd")
        self._trace.add(spans)

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
        self._metrics.close()
        self._events.close()
        self._trace.close()


class Trace:
    """The timeline, in Chrome's trace format: open it in Perfetto or chrome://tracing.

    One event a line, so that the file of a killed run can still be read and gone on with.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self._rows: dict[str, int] = {}
        self._separator = "[\n"
        events = _trace_events(path) if resume else []
        self._file = path.open("w")
        for event in events:
            if event["ph"] == "M":
                self._rows[event["args"]["name"]] = event["tid"]
            self._write(event)

    def add(self, spans: Iterable[Span]) -> None:
        for span in spans:
            row = self._rows.get(span.worker)
            if row is None:
                row = self._rows[span.worker] = len(self._rows) + 1
                label = {"name": "thread_name", "ph": "M", "args": {"name": span.worker}}
                self._write({**label, "pid": 1, "tid": row})
            times = {"ts": round(span.start * 1e6), "dur": round(span.seconds * 1e6)}
            self._write({"name": span.phase, "ph": "X", **times, "pid": 1, "tid": row})

    def close(self) -> None:
        self._file.write("\n]\n" if self._separator == ",\n" else "[]\n")
        self._file.close()

    def _write(self, event: dict[str, Any]) -> None:
        self._file.write(self._separator + json.dumps(event))
        self._separator = ",\n"


def _trace_events(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line.rstrip(",")) for line in lines if line.startswith("{")]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file. A last line that a crash cut short is left out.

    Raises:
        DataError: another line is not JSON.
    """
    text = path.read_text() if path.is_file() else ""
    whole, _, _ = text.rpartition("\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: not JSON ({error}); repair or remove the line"
            ) from error
    return rows


def repeatable(row: dict[str, Any]) -> dict[str, Any]:
    """The part of a row that equal runs have in common: no times, no restarts."""
    return {key: value for key, value in row.items() if not key.startswith(UNREPEATABLE)}


def rollout_file(run: RunDirectory, iteration: int) -> Path:
    return run.rollouts / f"iteration_{iteration:06d}.parquet"


def rollout_table(
    iteration: int, groups: Sequence[ScoredGroup], advantages: Advantages
) -> pa.Table:
    """One row a rollout: identity, tokens, logprobs, spec, seed, version, every score."""
    rows: dict[str, list[Any]] = {}

    def put(name: str, values: Iterable[Any]) -> None:
        rows.setdefault(name, []).extend(values)

    for index, group in enumerate(groups):
        rollouts, request = group.rollouts, group.rollouts.request
        count, spec = request.num_rollouts, request.spec
        identity = {
            "iteration": iteration,
            "group": request.group,
            "seed": request.seed,
            "class_index": request.condition.class_index,
            "text": request.condition.text,
            "policy_version": rollouts.version,
            "temperature": spec.temperature,
            "top_k": spec.top_k,
            "top_p": spec.top_p,
            "cfg_scale": spec.cfg_scale,
            "guidance": spec.guidance,
        }
        for name, value in identity.items():
            put(name, [value] * count)
        put("rollout", range(count))
        put("tokens", rollouts.tokens)
        put("logprobs", rollouts.logprobs)
        put("entropies", rollouts.entropies)
        for name, values in advantages.rewards.items():
            put(f"reward_{name}", values[index].astype(np.float64))
        put("advantage", advantages.values[index])
        put("error", group.scores.errors)
    return pa.table(rows)


def _keep_before(run: RunDirectory, first: int) -> None:
    kept = [row for row in read_metrics(run.metrics) if row["iteration"] < first]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in kept))
    for file in run.rollouts.glob("iteration_*.parquet"):
        if int(file.stem.removeprefix("iteration_")) >= first:
            file.unlink()
