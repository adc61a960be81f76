"""The learner's batches of a run, from its stored rollouts: `make_batch` read back.

Everything that a step needs is in the Parquet files (tokens, behaviour logprobs, advantages,
versions, sampling spec), but for the features of captions: conditions are drawn again as the run
drew them, and compared with the class and text of every group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from cluster.errors import DataError
from cluster.io.run_layout import CAPTIONS, rollout_name
from cluster.messages import Condition, SamplingSpec
from learner.config import RunConfig
from learner.data.conditions import ConditionStream
from learner.rollouts.images import rollout_files
from learner.rollouts.parquet import read_file
from learner.runs.records import counted_from
from learner.runs.run_dir import RunDirectory
from learner.training.batch import TrainingBatch

SPEC = ("temperature", "top_k", "top_p", "cfg_scale", "guidance")


class StoredBatches:
    """Batches of a run by iteration, counted from 0 as the learner does.

    Raises:
        DataError: the run's conditions cannot be read.
    """

    def __init__(self, run: RunDirectory, config: RunConfig) -> None:
        self._run, self._config = run, config
        self.base = counted_from(run)
        """Number of the first iteration in the records."""
        conditions = stored_conditions(run, config)
        self._stream = ConditionStream(conditions, config.groups_per_iteration, config.seed)

    def kept(self) -> list[int]:
        """Iterations whose rollouts are there, oldest first."""
        return [number - self.base for number in rollout_files(self._run)]

    def __call__(self, iteration: int) -> TrainingBatch:
        """
        Raises:
            DataError: missing, damaged, or not the rollouts of this run.
        """
        file = self._run.rollouts / rollout_name(iteration + self.base)
        table, config = read_file(file), self._config
        groups, size = config.groups_per_iteration, config.rollouts_per_group
        if table.num_rows != groups * size:
            raise DataError(
                f"{file}: {table.num_rows} rollouts, expected {groups} groups of {size}, as "
                "config.yaml has them"
            )
        drawn = self._stream.draw(iteration)
        _check_conditions(file, table, drawn, size)
        valid = table["error"].is_null().to_numpy()
        return TrainingBatch(
            iteration=iteration,
            tokens=_rows(table, "tokens")[valid],
            behaviour=_rows(table, "logprobs")[valid],
            conditions=tuple(
                drawn[row // size] for row, scored in enumerate(valid.tolist()) if scored
            ),
            advantages=table["advantage"].to_numpy()[valid],
            versions=table["policy_version"].to_numpy()[valid],
            specs=_specs(table),
        )


def stored_conditions(run: RunDirectory, config: RunConfig) -> list[Condition]:
    """The run's conditions, with the features that it made of captions; nothing is encoded here."""
    asked, made = config.conditions, run.path / CAPTIONS
    if asked.captions and asked.encoder:
        asked = replace(asked, encoder="")  # the file itself has features, unless some were made
        if made.is_file():
            asked = replace(asked, captions=str(made), column="")
    return asked.conditions()


def _check_conditions(file: Path, table: pa.Table, drawn: Sequence[Condition], size: int) -> None:
    """
    Raises:
        DataError: a group is not of the condition that the run's seed draws.
    """
    first = table.take(list(range(0, table.num_rows, size)))
    for group, row in enumerate(first.select(["text", "class_index"]).to_pylist()):
        expected = drawn[group]
        if (row["text"], row["class_index"]) != (expected.text, expected.class_index):
            raise DataError(
                f"{file}: group {group} is of {row['text']!r}, expected {expected.text!r}: were "
                "the run's captions or names changed since?"
            )


def _rows(table: pa.Table, column: str) -> np.ndarray:
    """(N, T) of a column of lists."""
    values = table[column].combine_chunks().flatten().to_numpy()
    return values.reshape(table.num_rows, -1)


def _specs(table: pa.Table) -> tuple[SamplingSpec, ...]:
    rows = table.select(SPEC).to_pylist()
    return tuple(SamplingSpec(**dict(row)) for row in dict.fromkeys(tuple(r.items()) for r in rows))
