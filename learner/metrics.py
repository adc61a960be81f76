"""What an iteration leaves behind: a line of metrics, TensorBoard events, rollouts, spans."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DataError
from cluster.messages import ScoredGroup, Span
from learner.advantage import Advantages
from learner.rows import staleness_of
from learner.rundir import RunDirectory
from learner.timeline import QUEUE, Usage

UNREPEATABLE = ("time/", "fleet/")
"""Prefixes of metrics that differ between equal runs."""
OVERLAPPING = (QUEUE, "decode")
"""Phases with a row of their own in the trace: what waits in a worker overlaps with what it does,
and images are decoded while the next group's tokens are."""


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
        self.usage = Usage(time.time())
        """How much each role worked since now."""

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
        if "version" in row:
            ages = staleness_of(groups, row["version"] - 1)
            self._events.add_histogram("staleness/groups", ages, iteration)
        if self._rollouts:
            moments = row.get("moments/version", 0)
            table = rollout_table(iteration, groups, advantages, moments)
            pq.write_table(table, rollout_file(self._run, iteration), compression="zstd")
        spans = tuple(spans)
        self.usage.add(spans)
        self._trace.add(spans)
        self._trace.idle({use.role: use.idle for use in self.usage.shares()})

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
    iteration: int, groups: Sequence[ScoredGroup], advantages: Advantages, moments: int
) -> pa.Table:
    """One row a rollout: identity, tokens, logprobs, spec, seed, version of the policy (and of each
    token's, where they differ) and of the moments that judged it, every score."""
    rows: dict[str, Any] = {}

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
            "moments_version": moments,
            "temperature": spec.temperature,
            "top_k": spec.top_k,
            "top_p": spec.top_p,
            "cfg_scale": spec.cfg_scale,
            "guidance": spec.guidance,
        }
        for name, value in identity.items():
            put(name, [value] * count)
        put("rollout", range(count))
        versions = rollouts.token_versions
        put("token_versions", [None if versions is None else versions.tolist()] * count)
        put("tokens", rollouts.tokens)
        put("logprobs", rollouts.logprobs)
        put("entropies", rollouts.entropies)
        for name, values in advantages.rewards.items():
            put(f"reward_{name}", values[index].astype(np.float64))
        put("advantage", advantages.values[index])
        put("error", group.scores.errors)
    rows["token_versions"] = pa.array(rows["token_versions"], pa.list_(pa.int32()))
    return pa.table(rows)


def _keep_before(run: RunDirectory, first: int) -> None:
    kept = [row for row in read_metrics(run.metrics) if row["iteration"] < first]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in kept))
    for file in run.rollouts.glob("iteration_*.parquet"):
        if int(file.stem.removeprefix("iteration_")) >= first:
            file.unlink()
