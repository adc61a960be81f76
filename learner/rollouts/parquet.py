"""Rollouts as Parquet files of one schema.

A column has the same type in every file, even if all its values are missing. Files of runs with
other rewards differ in `reward_*` columns: `pa.concat_tables(tables, promote_options="default")`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DataError
from cluster.io.files import replacing, writing
from cluster.messages import ScoredGroup
from learner.grpo.advantage import Advantages

VERSION = 2
"""Of the schema."""
VERSION_KEY = b"tessera.rollouts.version"
IDENTITY = {
    "iteration": pa.int64(),
    "group": pa.int64(),
    "seed": pa.int64(),
    "class_index": pa.int64(),
    "text": pa.string(),
    "policy_version": pa.int64(),
    "moments_version": pa.int64(),
    "temperature": pa.float64(),
    "top_k": pa.int64(),
    "top_p": pa.float64(),
    "cfg_scale": pa.float64(),
    "guidance": pa.string(),
}
"""Equal for all rollouts of a group."""
SAMPLED = {
    "rollout": pa.int64(),
    "token_versions": pa.list_(pa.int32()),  # empty; the column stays for one release
    "tokens": pa.list_(pa.int32()),
    "logprobs": pa.list_(pa.float32()),
    "entropies": pa.list_(pa.float32()),
}
SCORED = {"advantage": pa.float32(), "error": pa.string()}
REWARD = "reward_"


def rollout_schema(rewards: Iterable[str]) -> pa.Schema:
    """Columns of a file, given the names of the rewards."""
    scores = {f"{REWARD}{name}": pa.float64() for name in rewards}
    version = {VERSION_KEY: str(VERSION).encode()}
    return pa.schema(list((IDENTITY | SAMPLED | scores | SCORED).items()), metadata=version)


def rollout_table(
    iteration: int, groups: Sequence[ScoredGroup], advantages: Advantages, moments: int
) -> pa.Table:
    """One row a rollout: identity, tokens, logprobs, spec, seed, versions of policy and moments,
    every score."""
    schema = rollout_schema(advantages.rewards)
    rows: dict[str, list[Any]] = {name: [] for name in schema.names}
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
        found: dict[str, Iterable[Any]] = {
            name: [value] * count for name, value in identity.items()
        } | {
            "rollout": range(count),
            "token_versions": [None] * count,
            "tokens": rollouts.tokens,
            "logprobs": rollouts.logprobs,
            "entropies": rollouts.entropies,
            "advantage": advantages.values[index].tolist(),
            "error": group.scores.errors,
        }
        for name, rewards in advantages.rewards.items():
            found[f"{REWARD}{name}"] = rewards[index].tolist()
        for name, values in found.items():
            rows[name].extend(values)
    return pa.table(rows, schema=schema)


def write_rollouts(file: Path, table: pa.Table) -> None:
    """Write a file atomically.

    Raises:
        StorageError: no space left.
    """
    with writing(file), replacing(file) as partial:
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)


def read_file(file: Path, columns: Collection[str] | None = None) -> pa.Table:
    """A file of any version, with the columns and types of today's schema: a column that it lacks
    is missing in all rows.

    Args:
        columns: None: all.

    Raises:
        DataError: damaged, or none of rollouts.
    """
    try:
        there = pq.read_schema(file).names
        known = rollout_schema(reward_names(there))
        wanted = known.names if columns is None else [n for n in known.names if n in columns]
        found = pq.read_table(file, columns=[name for name in wanted if name in there])
        arrays = [
            found[name].cast(known.field(name).type)
            if name in there
            else pa.nulls(found.num_rows, known.field(name).type)
            for name in wanted
        ]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{file} is no readable file of rollouts ({error})") from error
    if lacking := [name for name in ("iteration", "group", "tokens") if name not in there]:
        raise DataError(f"{file} is none of rollouts: it has no column {lacking[0]!r}")
    return pa.table(arrays, schema=pa.schema([known.field(name) for name in wanted]))


def reward_names(columns: Iterable[str]) -> list[str]:
    """The rewards among the columns of a file."""
    return [name.removeprefix(REWARD) for name in columns if name.startswith(REWARD)]
