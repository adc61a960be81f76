"""Rollouts of any iteration have one schema, so that files are read as one table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from cluster.messages import Condition, ScoredGroup
from learner.grpo.advantage import group_advantages
from learner.monitoring.metrics import Recorder
from learner.rollouts.parquet import (
    VERSION,
    VERSION_KEY,
    rollout_schema,
    rollout_table,
    write_rollouts,
)
from learner.runs import records
from learner.runs.run_dir import RunDirectory
from rewards.combine import Combiner, RewardTerm
from tests.small_run import small_config
from tests.unit.helpers import scored_group

CASES = ("plain", "errors", "all errors", "captions", "two groups")


def groups_of(case: str, *rewards: str) -> list[ScoredGroup]:
    errors = {"errors": [None, "clip: boom"], "all errors": ["clip: boom", "clip: boom"]}
    failed = errors.get(case, [None, None])
    scores = {
        name: [np.nan if error else 0.1 * k for k, error in enumerate(failed)] for name in rewards
    }
    group = scored_group(scores, errors=failed)
    rollouts = group.rollouts
    if case == "captions":
        request = replace(rollouts.request, condition=Condition(text="a cat"))
        rollouts = replace(rollouts, request=request)
    group = replace(group, rollouts=rollouts)
    return [group, group] if case == "two groups" else [group]


def table_of(case: str, *rewards: str) -> pa.Table:
    groups = groups_of(case, *rewards)
    terms = {name: RewardTerm() for name in rewards}
    return rollout_table(3, groups, group_advantages(groups, {}, Combiner(terms)), 3)


def test_every_column_has_its_type_whatever_is_in_it() -> None:
    tables = {case: table_of(case, "clip") for case in CASES}
    expected = rollout_schema(["clip"])
    assert {case: table.schema.equals(expected, check_metadata=True) for case, table in
            tables.items()} == dict.fromkeys(CASES, True)  # fmt: skip
    assert pa.null() not in expected.types
    whole = pa.concat_tables(tables.values())
    assert whole["error"].null_count == whole.num_rows - 3
    assert whole["class_index"].null_count == 2
    assert whole["text"].to_pylist()[6:8] == ["a cat", "a cat"]
    assert tables["plain"]["token_versions"].null_count == 2


def test_files_are_read_as_one(tmp_path: Path) -> None:
    for number, case in enumerate(CASES):
        write_rollouts(tmp_path / f"iteration_{number:06d}.parquet", table_of(case, "clip"))
    files = sorted(tmp_path.iterdir())
    whole = pa.dataset.dataset(tmp_path, format="parquet").to_table()
    assert whole.num_rows == 12
    assert whole["error"].to_pylist().count("clip: boom") == 3
    assert pa.concat_tables([pq.read_table(file) for file in files]).num_rows == 12
    assert pq.read_table([str(file) for file in files]).num_rows == 12
    for file in files:
        assert pq.read_metadata(file).metadata[VERSION_KEY] == str(VERSION).encode()


def test_files_with_other_rewards_are_put_together_by_name(tmp_path: Path) -> None:
    tables = [table_of("plain", "clip"), table_of("errors", "clip", "mine")]
    whole = pa.concat_tables(tables, promote_options="default")
    assert whole["reward_mine"].null_count == 2
    assert whole["reward_clip"].null_count == 0
    for number, table in enumerate(tables):
        write_rollouts(tmp_path / f"{number}.parquet", table)
    schema = pa.unify_schemas([table.schema for table in tables])
    found = pa.dataset.dataset(tmp_path, schema=schema, format="parquet").to_table()
    assert found.num_rows == 4


@pytest.mark.parametrize("case", CASES)
def test_values_survive(case: str, tmp_path: Path) -> None:
    (group, *_), table = groups_of(case, "clip"), table_of(case, "clip")
    write_rollouts(tmp_path / "x.parquet", table)
    row = pq.read_table(tmp_path / "x.parquet").to_pylist()[1]
    assert row["tokens"] == group.rollouts.tokens[1].tolist()
    assert row["logprobs"] == group.rollouts.logprobs[1].tolist()
    assert row["entropies"] == group.rollouts.entropies[1].tolist()
    assert row["error"] == group.scores.errors[1]
    assert (row["iteration"], row["rollout"], row["moments_version"]) == (3, 1, 3)
    expected = group.scores.scores["clip"][1]
    assert np.isnan(row["reward_clip"]) if np.isnan(expected) else row["reward_clip"] == expected


def test_files_of_an_earlier_version_are_gone_on_from(tmp_path: Path) -> None:
    run = RunDirectory.create(str(tmp_path / "run"), small_config())
    old = table_of("plain", "clip").replace_schema_metadata(None)
    old = old.set_column(old.schema.get_field_index("error"), "error", pa.nulls(2))
    file = records.rollout_file(run, 0)
    pq.write_table(old, file)
    run.metrics.write_text('{"iteration": 0}\n')
    before = file.read_bytes()
    Recorder(run, 1, rollouts=True).close()
    assert file.read_bytes() == before
