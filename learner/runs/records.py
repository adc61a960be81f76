"""A run's rows (metrics.jsonl, evaluations.jsonl) and table: read, vouched for, cut back.

Rows are lines of JSON that begin with the step they belong to, in order. Whatever a crash left
(half a line, rows after the checkpoint, a Parquet file without its row) is put right when a run
goes on.

Iterations are counted by how many are done, from 1, as steps are: row, file and checkpoint of the
same number belong together. Runs that were begun when rows counted from 0 keep to that, since
their checkpoints vouch for the rows as they are; arguments here are numbers of done iterations.
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
"""The row of the tuned policy in the table of the evaluations."""
ITERATION, STEP = "iteration", "step"
"""The first field of a row of metrics, and of evaluations."""


def counted_from(run: RunDirectory) -> int:
    """The number of a run's first iteration in its records: 1, or 0 where it was begun so."""
    rows = _rows(run.metrics, ITERATION)
    if rows:
        first = rows[0][1]
        number: int = first[ITERATION]
        done = first.get("version", number or 1)  # of the policy, after the iteration
        return 0 if number == done - 1 else 1
    return 0 if rollout_file(run, 0).is_file() else 1


def rollout_file(run: RunDirectory, iteration: int) -> Path:
    """The file of an iteration, by its number in the run's records."""
    return run.rollouts / rollout_name(iteration)


def read_rows(path: Path, first_field: str) -> list[dict[str, Any]]:
    """Rows of a file. A last line that a crash cut short is left out.

    Raises:
        DataError: another line is not such a row.
    """
    return [row for _, row in _rows(path, first_field)]


def digests(run: RunDirectory, step: int) -> dict[str, str]:
    """File name -> SHA-256 of what it holds up to a step: a checkpoint keeps them, and a run that
    goes on from it notices when they differ.

    Raises:
        DataError: a file cannot be read.
    """
    parts = {
        run.metrics: _lines(run.metrics, ITERATION, step + counted_from(run)),
        run.evaluations: _lines(run.evaluations, STEP, step + 1),
        run.evaluation: _table(run),
    }
    return {file.name: hashlib.sha256(data).hexdigest() for file, data in parts.items() if data}


def check(run: RunDirectory, step: int, vouched: Mapping[str, str]) -> None:
    """Compare a run's files with what a checkpoint says of them.

    Raises:
        DataError: one is not what it was.
    """
    now = digests(run, step)
    for name, digest in vouched.items():
        file = run.path / name
        if not file.is_file():
            logger.warning("note: %s is gone: its rows up to iteration %d are missing", name, step)
        elif now.get(name) != digest:
            raise DataError(
                f"{file} is not what it was when iteration {step} was done: it is damaged, or was "
                "edited. Put a copy of it back; or move it away, and the run goes on without its "
                "rows"
            )


def truncate(run: RunDirectory, done: int, *, rollouts: bool) -> None:
    """Leave what belongs to the first `done` iterations, each once.

    Raises:
        DataError: a row cannot be read.
        StorageError: there is no room.
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
            f"{lacking[0]}: they were learned from, and are not drawn again"
        )


def keep(run: RunDirectory, iterations: range, *, rollouts: bool) -> None:
    """Have the records of some iterations on the disk.

    Args:
        iterations: by how many were done before each.

    Raises:
        StorageError: they cannot be brought there.
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


def _rows(path: Path, first_field: str) -> list[tuple[bytes, dict[str, Any]]]:
    try:
        data = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    whole, _, _ = data.rpartition(b"\n")
    rows: list[tuple[bytes, dict[str, Any]]] = []
    for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or type(row.get(first_field)) is not int:
                raise ValueError(f"a row with {first_field!r} was expected")
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: not JSON ({error}); repair or remove the line"
            ) from error
        rows.append((line, row))
    return rows


def _lines(path: Path, field: str, end: int) -> bytes:
    """The rows before `end`, as they are written; the first of each step."""
    kept: dict[int, bytes] = {}
    for line, row in _rows(path, field):
        if row[field] < end:
            kept.setdefault(row[field], line + b"\n")
    return b"".join(kept.values())


def _table(run: RunDirectory) -> bytes:
    """The evaluations before training, in one form."""
    rows = {name: row for name, row in run.read_evaluation().items() if name != TUNED}
    return json.dumps(rows, sort_keys=True).encode() if rows else b""


def _readable(file: Path) -> bool:
    try:
        pq.read_metadata(file)
    except (pa.ArrowException, OSError):
        return False
    return True
