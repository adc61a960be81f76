"""What the command line names, and the rows that follow from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from actors.checkpoints.loading import PolicyConfig
from cluster.errors import ConfigError
from cluster.io.run_layout import MANIFEST, POLICY_FILE, step_name
from cluster.messages import SamplingSpec
from cluster.model_files.tensors import locate
from learner.evaluation.rows import label, parse_sampling, rows_of
from learner.evaluation.targets import PolicyOptions, Target, find_targets
from learner.runs.run_dir import RunDirectory
from tests.small_run import small_config

NONE = PolicyOptions()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 2 and 4."""
    made = RunDirectory.create(str(tmp_path / "run"), small_config(seed=3))
    for step in (2, 4):
        folder = made.checkpoints / step_name(step)
        folder.mkdir()
        shutil.copy(locate(PolicyConfig().checkpoint), folder / POLICY_FILE)
        (folder / MANIFEST).touch()
    return made.path


def test_a_run_is_its_base_and_its_newest_policy(run: Path) -> None:
    config, targets = find_targets([str(run)], "", NONE)
    assert config.seed == 3
    assert [(each.name, each.step, each.tuned) for each in targets] == [
        ("base", 0, False),
        ("tuned", 4, True),
    ]
    assert targets[1].policy == PolicyConfig(
        checkpoint=str(run / "checkpoints" / "step_000004" / POLICY_FILE)
    )


def test_of_a_run_the_best_checkpoint_comes_before_the_newest(run: Path) -> None:
    (run / "best.json").write_text(json.dumps({"step": 2}))
    assert find_targets([str(run)], "", NONE)[1][1].step == 2
    assert find_targets([str(run)], "", PolicyOptions(step=4))[1][1].step == 4
    (run / "best.json").write_text(json.dumps({"step": 3}))  # of a checkpoint that is gone
    assert find_targets([str(run)], "", NONE)[1][1].step == 4
    with pytest.raises(ConfigError, match=r"keeps no checkpoint of step 3: there are 2, 4"):
        find_targets([str(run)], "", PolicyOptions(step=3))


def test_a_run_without_a_checkpoint_is_refused(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match=r"no complete checkpoint .* base policy alone: --preset"):
        find_targets([str(run)], "", NONE)
    config, targets = find_targets([], str(run / "config.yaml"), NONE)
    assert (config.seed, [each.name for each in targets]) == (3, ["base"])


def test_checkpoints_beside_their_run_and_moved_away(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / "step_000002"
    config, targets = find_targets([str(checkpoint)], "", NONE)
    assert (config.seed, targets[0].name, targets[0].step) == (3, "step 2", 2)
    shutil.copy(run / "config.yaml", checkpoint)
    moved = shutil.copytree(checkpoint, tmp_path / "elsewhere" / "kept" / "step_000002")
    assert find_targets([str(moved)], "", NONE)[0].seed == 3
    (moved / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="--preset NAME is needed"):
        find_targets([str(moved)], "", NONE)


def test_several_runs_share_their_base_policy(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    _, targets = find_targets([str(run), str(other)], "", NONE)
    assert [each.name for each in targets] == ["run base", "run tuned", "other tuned"]


def test_models_and_images_need_a_preset(tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    images, policy = str(tmp_path / "samples.npz"), str(locate(PolicyConfig().checkpoint))
    with pytest.raises(ConfigError, match=r"--preset NAME is needed"):
        find_targets([images], "", NONE)
    with pytest.raises(ConfigError, match=r"there is --preset llamagen-b-256"):
        find_targets(["llamagen-b-256"], "", NONE)
    _, targets = find_targets([images, policy, "digits:train"], "miniature", NONE)
    assert [(each.name, bool(each.policy), each.images) for each in targets] == [
        ("samples.npz", False, images),
        ("policy", True, ""),
        ("digits:train", False, "digits:train"),
    ]
    (tmp_path / "folder").mkdir()
    _, (folder,) = find_targets([str(tmp_path / "folder")], "miniature", NONE)
    assert folder.images == str(tmp_path / "folder")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ([], "what should be evaluated"),
        (["runs/none"], "runs/none: there is no such file or directory"),
        (["gone.npz"], "gone.npz: there is no such file"),
        (["llamagen-b-265"], "did you mean 'llamagen-b-256'"),
    ],
)
def test_what_is_not_there(what: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_targets(what, "", NONE)


def test_two_targets_of_one_name(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "x.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    both = [str(tmp_path / folder / "x.npz") for folder in ("a", "b")]
    with pytest.raises(ConfigError, match=r"two of the targets are called 'x\.npz'"):
        find_targets(both, "miniature", NONE)


BASE = Target(name="base", policy=PolicyConfig())
TUNED = Target(name="tuned", policy=PolicyConfig(), tuned=True, step=4)


def test_rows_are_those_of_a_run_by_default() -> None:
    rows = rows_of([BASE, TUNED], small_config())
    assert [row.name for row in rows] == ["base", "base, CFG 1.5", "base, CFG 2", "tuned"]
    assert rows[3].folder == "tuned-step-4"
    assert rows[1].folder == "base-cfg-1.5"


def test_every_policy_under_every_sampling_and_scale() -> None:
    rows = rows_of([BASE, TUNED], small_config(), (1, 2), ("temperature=0.9", "top-k=8,top_p=.5"))
    assert [row.name for row in rows[:4]] == [
        "base, T 0.9", "base, CFG 2, T 0.9", "base, top-k 8, top-p 0.5",
        "base, CFG 2, top-k 8, top-p 0.5",
    ]  # fmt: skip
    assert len(rows) == 8
    assert rows[7].spec == SamplingSpec(cfg_scale=2, guidance="guided", top_k=8, top_p=0.5)
    assert rows[4].spec == SamplingSpec(temperature=0.9)


def test_a_policy_tuned_under_guidance_is_sampled_as_it_was_learned() -> None:
    guided = small_config(sampling={"cfg_scale": 3.0, "guidance": "distil"})
    base, tuned = rows_of([BASE, TUNED], guided)
    assert (base.name, tuned.name) == ("base, CFG 3", "tuned")
    assert tuned.spec == SamplingSpec()


def test_rows_that_are_the_same_are_refused() -> None:
    with pytest.raises(ConfigError, match="two rows are called 'base, CFG 2'"):
        rows_of([BASE], small_config(), (2, 2.0))


@pytest.mark.parametrize("text", ["", "top_k", "heat=1", "top_k=1.5", "top_k=1,top_k=2"])
def test_samplings_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--samplings: "):
        parse_sampling(text)


def test_impossible_values_of_a_sampling_are_refused() -> None:
    with pytest.raises(ConfigError, match="top_p must be in"):
        rows_of([BASE], small_config(), (), ("top_p=2",))


def test_labels_say_what_is_unusual() -> None:
    assert label(SamplingSpec()) == ""
    spec = SamplingSpec(cfg_scale=1.75, guidance="guided", temperature=0.5, top_k=10, top_p=0.9)
    assert label(spec) == ", CFG 1.75, T 0.5, top-k 10, top-p 0.9"
