"""`python -m learner.replay`: the learner's steps repeat from stored rollouts, bit for bit."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from actors.text.features import write_caption_features
from cluster.errors import DataError
from cluster.io.run_layout import CAPTIONS, CONFIG, POLICY_FILE, step_name
from cluster.messages import TRAIN, GroupScores, RolloutGroup, ScoredGroup
from cluster.model_files.tensors import read_tensors
from learner import replay
from learner.checkpoints.checkpoint import complete
from learner.config import dump
from learner.data.conditions import ConditionStream
from learner.fleet_plan import fleet_plan
from learner.grpo.advantage import group_advantages
from learner.monitoring.metrics import Recorder
from learner.rollouts.prefetch import requests_for
from learner.rollouts.stored_batches import stored_conditions
from learner.runs.run_dir import RunDirectory
from learner.training.batch import make_batch
from learner.training.learner import Learner
from rewards.combine import Combiner
from tests.small_run import small_config

RICH = {
    "max_staleness": 1,
    "learner": {"minibatches": 2},
    "entropy": {"controller": "target"},
    "real": {"weight": 0.1, "batch": 4},
    "loss": {"kl_coef": 0.01, "ratio_to": "proximal", "importance_cap": 2.0},
}
"""Everything that a step may depend on beside its rollouts."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four iterations of a sampler, scores from nowhere and a learner, as a run records them;
    checkpoints after two and four."""
    folder = tmp_path_factory.mktemp("replay")
    generator = np.random.default_rng(0)
    tokens, classes = generator.integers(0, 64, (9, 16)), np.arange(9)
    np.savez(folder / "real.npz", tokens=tokens, classes=classes)
    real = RICH["real"] | {"source": str(folder / "real.npz")}
    config = small_config(**{**RICH, "real": real})
    run = RunDirectory.create(str(folder / "run"), config)
    plan, combiner = fleet_plan(config), Combiner(config.rewards.terms())
    learner, sampler = (r.factory(r.config, name=r.name) for r in (plan.learner, plan.sampler))
    recorder = Recorder(run, 0, rollouts=True)
    stream = ConditionStream(config.conditions.conditions(), 4, config.seed)
    learner.start(2.5)
    snapshots = [learner.snapshot()]
    for iteration in range(4):
        sampler.load_weights(snapshots[max(iteration - 1, 0)])
        asked = requests_for(config, stream.draw(iteration), TRAIN, iteration)
        groups = [scored(sampler.sample([one])[0], generator) for one in asked]
        advantages = group_advantages(groups, {}, combiner)
        report = learner.step(make_batch(iteration, groups, advantages))
        row = {"iteration": iteration + 1, "version": report.version, **report.metrics}
        recorder.record(row, groups, advantages, ())
        snapshots.append(learner.snapshot())
        if iteration % 2:
            save(run, learner, iteration + 1)
    recorder.close()
    return run.path


def scored(rollouts: RolloutGroup, generator: np.random.Generator) -> ScoredGroup:
    """Random scores, none of the second image of the second group."""
    failed = rollouts.request.group == 1
    values = generator.normal(size=4).astype(np.float32)
    errors = tuple("clip: boom" if failed and k == 1 else None for k in range(4))
    values[[error is not None for error in errors]] = np.nan
    scores = GroupScores(
        key=rollouts.request.key, scores={"clip": values}, features={}, errors=errors
    )
    return ScoredGroup(rollouts=rollouts, scores=scores)


def save(run: RunDirectory, learner: Learner, step: int) -> None:
    partial = run.checkpoints / f".{step_name(step)}.0"
    partial.mkdir()
    learner.save(partial)
    content = {CONFIG: run.config_with_checksum().encode()}
    complete(partial, run.checkpoints / step_name(step), content, run.identity, {}, {})


@pytest.fixture
def copied(recorded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(recorded, tmp_path / "copy")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def replayed(run: Path, *options: str) -> int:
    return replay.main([str(run), *options])


@pytest.mark.parametrize(
    ("options", "start", "iterations", "weights"),
    [
        ([], "the base policy", 4, 2),
        (["--from-step", "2"], "checkpoint step_000002", 2, 1),
        (["--iterations", "4"], "checkpoint step_000002", 2, 1),
        (["--iterations", "1-2"], "the base policy", 2, 1),
        (["--iterations", "2", "--from-step", "0"], "the base policy", 2, 1),
    ],
)
def test_recorded_numbers_return_bit_for_bit(
    options: list[str], start: str, iterations: int, weights: int, recorded: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = files_of(recorded)
    assert replayed(recorded, *options, "--check") == 0
    text = capsys.readouterr().out
    assert f"from {start}\n" in text
    assert f"{iterations} iterations, " in text
    assert f"weights after {weights} of them: equal bit for bit" in text
    assert text.count(" numbers equal") == iterations
    assert "not compared" not in text
    assert files_of(recorded) == before  # it only reads


def changed_advantages(run: Path, iteration: int) -> None:
    file = run / "rollouts" / f"iteration_{iteration:06d}.parquet"
    table = pq.read_table(file)
    at = table.schema.get_field_index("advantage")
    values = table["advantage"].to_numpy().copy()
    values[3] += 0.5
    pq.write_table(table.set_column(at, "advantage", pa.array(values)), file)


def test_a_difference_is_found_where_it_begins(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed_advantages(copied, 3)
    assert replayed(copied, "--check") == 1
    text = capsys.readouterr().out
    equal = [line for line in text.splitlines() if line.startswith("iteration ")]
    count = equal[0].split()[2]
    assert [f"{count} of {count}" in line for line in equal] == [True, True, False, False]
    assert "weights after it differ by" in equal[3]
    assert "2 iterations differ, from 3 on" in text
    assert replayed(copied) == 0  # shown, but not asked to be checked


def keep_columns(run: Path, iteration: int, names: tuple[str, ...]) -> None:
    """Leave these alone in an iteration's record."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[iteration - 1] = {n: v for n, v in rows[iteration - 1].items() if n in names}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_check_fails_where_nothing_was_kept_to_compare(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    identity = ("iteration", "version", "time")
    keep_columns(copied, 3, (*identity, "loss/lr"))
    assert replayed(copied, "--iterations", "3", "--check") == 0
    text = capsys.readouterr().out
    assert "1 iterations, 1 numbers: equal bit for bit" in text
    assert "not compared, since the records lack them: " in text
    assert "policy/entropy" in text
    keep_columns(copied, 3, identity)
    keep_columns(copied, 4, identity)
    assert replayed(copied, "--iterations", "3-4", "--check") == 1
    text = capsys.readouterr().out
    assert "iteration 3: not comparable\n" in text
    assert "2 iterations, 0 numbers, weights after 1 of them: 1 iterations not comp" in text
    assert "equal bit for bit" not in text


def test_weights_that_are_not_finite_differ(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In whichever tensor, and though the first ones are equal."""
    file = copied / "checkpoints" / step_name(2) / POLICY_FILE
    tensors = read_tensors(str(file))
    last = list(tensors)[-1]
    tensors[last] = torch.full_like(tensors[last], math.nan)
    save_file(tensors, file)
    assert replayed(copied, "--iterations", "1-2", "--from-step", "0", "--check") == 1
    assert "weights after it differ by nan at most" in capsys.readouterr().out


def test_other_settings_show_their_effect(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "numbers.json"
    options = ["--learner.lr", "0.002", "--iterations", "1-2", "--out", str(out)]
    assert replayed(recorded, *options, "--metrics", "loss/lr", "policy/entropy") == 0
    text = capsys.readouterr().out
    assert "settings that are not the run's: learner.lr\n" in text
    assert "only iteration 1 is what a run would have done" in text
    content = json.loads(out.read_text())
    assert (content["changed"], content["from_step"]) == (["learner.lr"], 0)
    rows = {(row["iteration"], row["metric"]): row for row in content["numbers"]}
    assert rows[1, "loss/lr"]["recorded"] == 0.001
    assert rows[1, "loss/lr"]["replayed"] == 0.002
    first, second = rows[1, "policy/entropy"], rows[2, "policy/entropy"]
    assert first["recorded"] == first["replayed"]
    assert second["recorded"] != second["replayed"]
    assert content["weights_off"]["2"] > 0


def test_a_table_of_numbers(recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "numbers.csv"
    assert replayed(recorded, "--iterations", "1", "--out", str(out)) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    metrics = json.loads((recorded / "metrics.jsonl").read_text().splitlines()[0])
    assert {row["metric"]: float(row["replayed"]) for row in rows} == {
        row["metric"]: metrics[row["metric"]] for row in rows
    }
    assert {"loss/real_ce", "policy/reference_kl", "policy/entropy_coef"} <= {
        row["metric"] for row in rows
    }
    assert replayed(recorded, "--out", str(out)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--check", "--loss.clip-low", "0.1"], "leave out loss.clip_low"),
        (["--from-step", "3"], "--from-step 3: there are 0, 2, 4"),
        (["--from-step", "4"], "nothing to replay: the run keeps iterations 1 to 4"),
        (["--iterations", "9"], "nothing to replay"),
        (["--iterations", "x"], "written as 5, 10-20"),
        (["--out", "numbers.txt"], ".json or a .csv"),
        (["--metrics", "loss/lrr", "--iterations", "1"], "did you mean 'loss/lr'?"),
        (["--learner.num-gpus", "1"], "none is usable here"),
        (["--real.source", "none.npz"], "none.npz"),
    ],
)
def test_what_cannot_be_replayed_is_refused(
    options: list[str], message: str, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replayed(recorded, *options) == (1 if "none.npz" in options else 2)
    assert message in capsys.readouterr().err


def test_lost_and_damaged_rollouts(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = copied / "rollouts" / "iteration_000002.parquet"
    whole = two.read_bytes()
    two.write_bytes(whole[:-50])
    assert replayed(copied) == 1
    assert "iteration_000002.parquet is no readable file" in capsys.readouterr().err
    two.unlink()
    assert replayed(copied) == 2
    assert "the rollouts of iteration 2 are not kept" in capsys.readouterr().err
    assert replayed(copied, "--from-step", "2", "--check") == 0
    shutil.rmtree(copied / "rollouts")
    assert replayed(copied) == 2
    assert "keeps no rollouts" in capsys.readouterr().err


def test_rollouts_of_other_conditions_are_refused(recorded: Path, tmp_path: Path) -> None:
    """Conditions are drawn again, since Parquet has no features of captions."""
    names = [f"digit {number}" for number in range(10)]
    config = small_config(conditions={"names": names})
    other = RunDirectory.create(str(tmp_path / "other"), config)
    for file in recorded.glob("rollouts/*"):
        shutil.copy(file, other.rollouts)
    shutil.copy(recorded / "metrics.jsonl", other.metrics)
    assert "digit 3" in dump(other.read_config())
    plan = replay.Replay.prepare(other, replay.Settings.of(config), "", None)
    with pytest.raises(DataError, match="were the run's captions or names changed"):
        next(iter(plan))


def test_where_equality_is_not_promised(recorded: Path) -> None:
    run = RunDirectory(recorded)
    plan = replay.Replay.prepare(run, replay.Settings.of(run.read_config()), "", None)
    assert plan.not_promised == ""
    for changes, why in (
        ({"num_learners": 2}, "2 learners"),
        ({"learner": {"num_gpus": 1}}, "on a GPU without --reproducible"),
    ):
        config = small_config(**changes)
        assert why in replay.Replay(**{**vars(plan), "config": config}).not_promised
    config = small_config(learner={"num_gpus": 1}, reproducible=True)
    assert replay.Replay(**{**vars(plan), "config": config}).not_promised == ""


def test_features_that_the_run_made_of_captions_are_read(tmp_path: Path) -> None:
    """Nothing is encoded: a text encoder may be tens of gigabytes."""
    (tmp_path / "captions.txt").write_text("a cat\ntwo dogs\n")
    asked = {"captions": str(tmp_path / "captions.txt"), "encoder": "no/such-encoder"}
    config = small_config(conditions=asked)
    run = RunDirectory.create(str(tmp_path / "run"), config)
    features = [np.full((2, 3), value, np.float32) for value in (1, 2)]
    write_caption_features(run.path / CAPTIONS, ["a cat", "two dogs"], iter(features))
    conditions = stored_conditions(run, config)
    assert [condition.text for condition in conditions] == ["a cat", "two dogs"]
    assert all(condition.features is not None for condition in conditions)
    (run.path / CAPTIONS).unlink()
    assert [each.features for each in stored_conditions(run, config)] == [None, None]
