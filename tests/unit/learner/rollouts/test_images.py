"""Stored rollouts read back: images of the sampler's, rows of any version, damage named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from actors.checkpoints.loading import PolicyConfig, init_policy, load_policy
from actors.models.taming import TamingConfig
from cluster.errors import DataError
from cluster.model_files.tensors import write_tensors
from cluster.weights import Packer
from learner.config import RunConfig
from learner.fleet_plan import fleet_plan
from learner.rollouts.images import decode_images, read_rollouts
from learner.rollouts.parquet import rollout_schema, write_rollouts
from learner.runs import records
from learner.runs.run_dir import RunDirectory
from tests.reduced import random_run
from tests.small_run import small_config
from tests.unit.helpers import request
from tests.unit.learner.rollouts.test_parquet import table_of


def sampled(config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (K, T) and images of a sampler with the base policy's weights."""
    role = fleet_plan(config).sampler
    sampler, policy = role.factory(role.config, name="sampler"), load_policy(config.policy)
    sampler.load_weights(Packer()(policy.state_dict(), 0, config=policy.config.to_dict()))
    condition = config.conditions.conditions()[1]
    asked = request(1, config.rollouts_per_group, condition=condition, spec=config.sampling)
    (group,) = sampler.sample([asked])
    return group.tokens, sampler.images(group)[0]


def spiral(config: RunConfig, folder: Path) -> RunConfig:
    """The same with a policy that draws tokens in another order than the raster's."""
    architecture = load_policy(config.policy, weights=False).config
    assert isinstance(architecture, TamingConfig)
    torch.manual_seed(1)
    policy = init_policy(replace(architecture, permuter="SpiralOut"))
    file = folder / "spiral.safetensors"
    write_tensors(file, policy.state_dict(), policy.config.to_dict())
    return replace(config, policy=PolicyConfig(checkpoint=str(file)))


@pytest.mark.parametrize("case", ["shipped", "vqgan-imagenet", "in another order", "captions"])
def test_images_are_the_samplers(case: str, tmp_path: Path) -> None:
    presets = {"in another order": "vqgan-imagenet", "captions": "llamagen-t2i"}
    if case == "shipped":
        config = small_config()
    else:
        on_cpu = {"num_gpus": 0, "image_dtype": "float32", "dtype": "float32"}
        changes = {"rollouts_per_group": 3, "sampler": on_cpu}
        config = random_run(presets.get(case, case), tmp_path, changes=changes)
    if case == "in another order":
        config = spiral(config, tmp_path)
    tokens, images = sampled(config)
    assert np.array_equal(decode_images(config, np.concatenate([tokens, tokens])), [*images] * 2)
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) > 1
    with pytest.raises(DataError, match="expected 0 to"):
        decode_images(config, np.full_like(tokens, 1 << 20))
    with pytest.raises(DataError, match="of another run"):
        decode_images(config, tokens[:, 1:])


def run_with(folder: Path, *tables: pa.Table) -> RunDirectory:
    run = RunDirectory.create(str(folder / "run"), small_config())
    for number, table in enumerate(tables, 1):
        write_rollouts(records.rollout_file(run, number), table)
    return run


def test_rows_of_chosen_iterations_and_columns(tmp_path: Path) -> None:
    run = run_with(tmp_path, table_of("plain", "clip"), table_of("captions", "clip", "mine"))
    whole = read_rollouts(run)
    assert whole.num_rows == 4
    assert set(whole.column_names) == set(rollout_schema(["clip", "mine"]).names)
    assert whole["reward_mine"].null_count == 2
    chosen = read_rollouts(run, [2, 7], ["reward_mine", "text"])
    assert sorted(chosen.column_names) == ["reward_mine", "text"]
    assert chosen["text"].to_pylist() == ["a cat", "a cat"]
    with pytest.raises(DataError, match=r"of 2 iterations, 1 to 2, but none .* \(3\)"):
        read_rollouts(run, [3])


def test_files_of_an_early_version(tmp_path: Path) -> None:
    """Types were those of the values then, and the oldest had fewer columns."""
    old = table_of("captions", "clip").replace_schema_metadata(None)
    for name in ("error", "class_index"):
        old = old.set_column(old.schema.get_field_index(name), name, pa.nulls(old.num_rows))
    old = old.drop_columns(["moments_version", "text"])
    run = run_with(tmp_path, old, table_of("errors", "clip"))
    found = read_rollouts(run)
    assert found.schema.field("error").type == pa.string()
    assert found["error"].to_pylist() == [None, None, None, "clip: boom"]
    assert found["moments_version"].to_pylist() == [None, None, 3, 3]


def test_damaged_files_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_with(tmp_path, *[table_of("plain", "clip")] * 3)
    one, two, three = (records.rollout_file(run, number) for number in (1, 2, 3))
    one.write_bytes(one.read_bytes()[:-100])
    pq.write_table(pa.table({"x": [1]}), two)
    assert read_rollouts(run).num_rows == 2
    assert [name in caplog.text for name in (one.name, two.name, three.name)] == [True, True, False]
    with pytest.raises(DataError, match="none of the 2 files"):
        read_rollouts(run, [1, 2])
    for file in (one, two, three):
        file.unlink()
    with pytest.raises(DataError, match="keeps no rollouts"):
        read_rollouts(run)
