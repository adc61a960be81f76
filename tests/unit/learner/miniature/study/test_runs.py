"""The configuration of an arm: pinned settings of the method, networks and data of the preset."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from learner.config import load_preset, merge, to_dict
from learner.miniature.build import with_networks
from learner.miniature.study import runs
from learner.miniature.study.part import Arm, folder_of
from learner.miniature.study.parts import LLAMAGEN, PARTS
from learner.miniature.study.runs import OF_TRAINING, changed, kept_values, run_config

FOLDER = Path("/networks")


def test_arms_change_what_they_name_and_nothing_else() -> None:
    plain = run_config(LLAMAGEN, Arm(name="x"), 3, FOLDER)
    instance = run_config(LLAMAGEN, LLAMAGEN.arm("instance only"), 3, FOLDER)
    assert instance.rewards.loo_fid.weight == 0
    assert instance.rewards.clip == plain.rewards.clip
    assert (plain.seed, plain.learner.num_threads) == (3, 1)
    assert plain.policy.checkpoint == "/networks/policy.safetensors"
    assert run_config(LLAMAGEN, Arm(name="x"), 3, FOLDER, iterations=7).iterations == 7


def test_the_judge_has_three_spaces() -> None:
    spaces = run_config(LLAMAGEN, Arm(name="x"), 3, FOLDER).judge.spaces()
    assert [(name, each.network) for name, each in spaces.items()] == [
        ("features", "convnet"), ("second", "pixels"), ("clip", "clip"),
    ]  # fmt: skip
    assert spaces["clip"].model.endswith("judge_clip")


def test_a_preset_that_changes_changes_only_arms_that_are_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = run_config(LLAMAGEN, Arm(name="x"), 3, FOLDER)
    new = {
        "iterations": 9,
        "learner": {"lr": 1e-3, "weight_decay": 0.5},
        "loss": {"kl_coef": 1.0},
        "entropy": {"controller": "target"},
        "guards": {"patience": 99},
        "sampling": {"temperature": 0.5},
        "rewards": {
            "extra": ["json:loads=0.5"],
            "further": {"pixels": {"features": {"network": "pixels"}}},
            "clip": {"weight": 3.0},
            "loo_fid": {"joint": True, "decay": 0.9},
        },
    }

    def changed_preset(folder: Path, preset: str) -> dict[str, Any]:
        return merge(with_networks(folder, preset), new)

    monkeypatch.setattr(runs, "with_networks", changed_preset)
    assert run_config(LLAMAGEN, Arm(name="x"), 3, FOLDER) == before
    shipped = run_config(LLAMAGEN, Arm(name="x", shipped=True), 3, FOLDER)
    assert (shipped.iterations, shipped.learner.lr) == (9, 1e-3)
    assert shipped.rewards.loo_fid.joint


@pytest.mark.parametrize(
    ("section", "others"),
    [
        ("sampling", set()),
        ("loss", set()),
        ("entropy", {"paper"}),
        ("learner", {"num_gpus", "num_cpus", "num_threads", "accelerator_type", "labels", "device",
                     "lora", "checkpointing", "compile", "reference_device", "adamw"}),
        ("rewards.loo_fid", {"reference", "num_threads", "rebuild_every"}),
        ("rewards.clip", {"model", "pretrained", "preprocessing", "precision", "batch_size", "tag",
                          "prompts", "enabled", "pool", "long_captions"}),
    ],
)  # fmt: skip
def test_the_method_names_every_setting(section: str, others: set[str]) -> None:
    """But how a run computes, and networks."""
    every: Any = to_dict(load_preset("miniature"))
    pinned: Any = LLAMAGEN.method
    for name in section.split("."):
        every, pinned = every[name], pinned[name]
    assert every.keys() - pinned.keys() <= others
    assert pinned.keys() <= every.keys()


def test_names_are_distinct_as_files_too() -> None:
    systems: dict[str, dict[str, object]] = {}
    for part in PARTS.values():
        policies = [*part.base, *(p for n in part.names for p in part.arm(n).policies)]
        assert len(set(map(folder_of, policies))) == len(policies), part.name
        for name in part.names:
            arms = systems.setdefault(part.system, {})
            arm = part.arm(name)
            config = run_config(part, arm, 1, FOLDER)
            assert arms.setdefault(arm.folder, config) == config, f"{part.name}: {name}"
    assert folder_of("base, CFG 1.5") == "base_CFG_1.5"


def test_every_arm_of_every_part_is_valid_and_its_own() -> None:
    for part in PARTS.values():
        configs = [run_config(part, arm, 1, FOLDER) for arm in part.arms]
        assert len({repr(config) for config in configs}) == len(configs), part.name


def test_parts_travel_to_other_processes() -> None:
    """A job that cannot be pickled makes the pool of processes wait for ever."""
    assert pickle.loads(pickle.dumps(PARTS)) == PARTS


def test_arms_may_name_networks_of_their_seed() -> None:
    part = PARTS["recall"]
    found = run_config(part, part.arm("joint LOO-FID in features and CLIP's"), 1, FOLDER)
    assert found.rewards.further["clip"].features.model == "/networks/clip"
    kept = kept_values(found, OF_TRAINING, FOLDER)
    assert kept["rewards.further.clip.features.model"] == "<networks>/clip"
    assert kept["policy.checkpoint"] == "<networks>/policy.safetensors"


def test_settings_that_came_since_must_be_at_their_defaults() -> None:
    kept = {"loss.kl_coef": 0.5, "gone": 1}
    now = {"loss.kl_coef": 0.5, "loss.clip_low": 0.2, "loss.kl_in": "reward"}
    assert changed(kept, now) == {"gone": (1, None), "loss.kl_in": ("loss", "reward")}
    assert changed(now, now) == {}
