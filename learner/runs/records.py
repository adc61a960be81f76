"""Records of a run (metrics.jsonl, evaluations.jsonl, evaluation.json): digests and truncation.

A record is a line of JSON with its step; steps increase. On resume, incomplete lines, records after
the checkpoint and Parquet files without a record are removed.

Records count iterations from 1, as steps do. Runs of an early version keep counting from 0, because
digests in their checkpoints cover the records. Arguments here are numbers of iterations done.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DataError
from cluster.io.files import replacing, sync, writing
from cluster.io.run_layout import iteration_of, rollout_name
from learner.runs.run_dir import RunDirectory

logger = logging.getLogger(__name__)

TUNED = "tuned"
"""Name of the tuned policy in the table of evaluations."""
ITERATION, STEP = "iteration", "step"
"""Field with the step, in metrics and in evaluations."""


def counted_from(run: RunDirectory) -> int:
    """Number of the first iteration in a run's records: 1, or 0 in an early version."""
    rows = _parse_lines(run.metrics, ITERATION)
    if rows:
        first = rows[0][1]
        number: int = first[ITERATION]
        done = first.get("version", number or 1)  # of the policy, after the iteration
        return 0 if number == done - 1 else 1
    return 0 if rollout_file(run, 0).is_file() else 1


def rollout_file(run: RunDirectory, iteration: int) -> Path:
    """The file of an iteration, by its number in the records."""
    return run.rollouts / rollout_name(iteration)


def read_records(path: Path, first_field: str) -> list[dict[str, Any]]:
    """Records of a file, without a last line that a crash cut short.

    Raises:
        DataError: another line is not JSON, or lacks the field.
    """
    return [row for _, row in _parse_lines(path, first_field)]


def digests(run: RunDirectory, step: int) -> dict[str, str]:
    """File name -> SHA-256 of its records up to a step, for the manifest of a checkpoint.

    Raises:
        DataError: a file cannot be read.
    """
    parts = {
        run.metrics: _lines(run.metrics, ITERATION, step + counted_from(run)),
        run.evaluations: _lines(run.evaluations, STEP, step + 1),
        run.evaluation: _table(run),
    }
    return {file.name: hashlib.sha256(data).hexdigest() for file, data in parts.items() if data}


def check(run: RunDirectory, step: int, expected: Mapping[str, str]) -> None:
    """Compare a run's records with the digests in a checkpoint.

    Raises:
        DataError: a file differs.
    """
    now = digests(run, step)
    for name, digest in expected.items():
        file = run.path / name
        if not file.is_file():
            logger.warning("note: %s is gone: its lines up to iteration %d are missing", name, step)
        elif now.get(name) != digest:
            raise DataError(
                f"{file} is not what it was when iteration {step} was done: it is damaged, or was "
                "edited. Put a copy of it back; or move it away, and the run continues without its "
                "lines"
            )


def truncate(run: RunDirectory, done: int, *, rollouts: bool) -> None:
    """Remove records and rollouts after `done` iterations, and duplicates.

    Args:
        rollouts: warn about iterations whose rollouts are missing.

    Raises:
        DataError: a record cannot be read.
        StorageError: no space left.
    """
    base = counted_from(run)
    for path, field, end in (
        (run.metrics, ITERATION, done + base),
        (run.evaluations, STEP, done + 1),
    ):
        if path.is_file():
            kept = _lines(path, field, end)
            with writing(path), replacing(path, durable=True) as partial:
                partial.write_bytes(kept)
    for file in run.rollouts.glob(".*.partial"):
        file.unlink()
    for file in run.rollouts.iterdir():
        number = iteration_of(file.name)
        if number is not None and (number >= done + base or not _readable(file)):
            file.unlink()
    numbers = range(base, done + base) if rollouts else ()
    lacking = [number for number in numbers if not rollout_file(run, number).is_file()]
    if lacking:
        logger.warning(
            f"note: the rollouts of {len(lacking)} iterations are missing or damaged, the first of "
            f"{lacking[0]}: they were learned from, and are not sampled again"
        )


def keep(run: RunDirectory, iterations: range, *, rollouts: bool) -> None:
    """Sync the records of some iterations (numbered from 0) to the disk.

    Raises:
        StorageError: it failed.
    """
    files = [run.metrics, run.evaluations]
    base = counted_from(run)
    files += [rollout_file(run, i + base) for i in iterations] if rollouts else []
    for file in files:
        if file.is_file():
            with writing(file):
                sync(file)
    with writing(run.rollouts):
        sync(run.rollouts)
        sync(run.path)


def _parse_lines(path: Path, first_field: str) -> list[tuple[bytes, dict[str, Any]]]:
    try:
        data = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    whole, _, _ = data.rpartition(b"\n")
    lines: list[tuple[bytes, dict[str, Any]]] = []
    for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or type(row.get(first_field)) is not int:
                raise ValueError(f"expected a line with {first_field!r}")
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: not JSON ({error}); repair or remove the line"
            ) from error
        lines.append((line, row))
    return lines


def _lines(path: Path, field: str, end: int) -> bytes:
    """The lines before `end`, byte for byte; the first of each step."""
    kept: dict[int, bytes] = {}
    for line, row in _parse_lines(path, field):
        if row[field] < end:
            kept.setdefault(row[field], line + b"\n")
    return b"".join(kept.values())


def _table(run: RunDirectory) -> bytes:
    """The evaluations before training, in canonical JSON."""
    rows = {name: row for name, row in run.read_evaluation().items() if name != TUNED}
    return json.dumps(rows, sort_keys=True).encode() if rows else b""


def _readable(file: Path) -> bool:
    try:
        pq.read_metadata(file)
    except (pa.ArrowException, OSError):
        return False
    return True
