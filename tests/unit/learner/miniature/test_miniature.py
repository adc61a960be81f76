"""The miniature's data, networks and the script that makes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress

from learner.data.digits import augment, digits, to_pixels
from learner.miniature.arms import ArmsConfig, Results, arm_config, interval, merge, write_csv
from learner.miniature.build import NETWORKS, BuildConfig, Builder


def test_the_split_is_fixed_and_disjoint() -> None:
    train, labels = digits("train")
    held_out, _ = digits("held-out")
    assert train.shape == (1000, 8, 8, 3)
    assert held_out.shape == (797, 8, 8, 3)
    assert (np.bincount(labels) >= 95).all()  # stratified
    assert labels[:8].tolist() == [1, 1, 9, 7, 9, 4, 1, 1]
    with pytest.raises(ValueError, match="'train' or 'held-out', found 'test'"):
        digits("test")


def test_augmentation_is_mild_and_seeded() -> None:
    pixels = to_pixels(digits("train")[0][:64])
    moved = augment(pixels, torch.Generator().manual_seed(0))
    assert torch.equal(moved, augment(pixels, torch.Generator().manual_seed(0)))
    assert 0.01 < (moved - pixels).abs().mean() < 0.3
    assert moved.min() >= -1.001


def test_shipped_networks_are_small() -> None:
    files = [file for file in NETWORKS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 6e6
    assert len([file for file in files if file.suffix == ".safetensors"]) == 7


def build(folder: Path, seed: int) -> dict[str, bytes]:
    with Progress(disable=True) as progress:
        Builder(BuildConfig(out=folder, seed=seed, scale=0.002, num_threads=1), progress).build()
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_building_is_deterministic_from_its_seed(tmp_path: Path) -> None:
    first, again, other = (
        build(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {
        "tokenizer.safetensors",
        "policy.safetensors",
        "features.safetensors",
        "clip/open_clip_model.safetensors",
        "preference/open_clip_model.safetensors",
    }  # the judge has a seed of its own


def test_arms_change_what_they_name_and_nothing_else(tmp_path: Path) -> None:
    config = ArmsConfig(out=tmp_path)
    plain = arm_config(config, 3, {})
    instance = arm_config(config, 3, {"rewards": {"loo_fid": {"weight": 0.0}}})
    assert instance.rewards.loo_fid.weight == 0
    assert instance.rewards.clip == plain.rewards.clip
    assert plain.seed == 3
    assert plain.policy.checkpoint == str(tmp_path / "networks" / "seed_3" / "policy.safetensors")


def test_merge_is_deep() -> None:
    assert merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 9}}) == {
        "a": {"b": 9, "c": 2},
        "d": 3,
    }


def test_interval_is_students(tmp_path: Path) -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert interval(values) == pytest.approx(2.776 * values.std(ddof=1) / 5**0.5, rel=1e-3)
    assert np.isnan(interval(values[:1]))
    results: Results = {"base": {"fid": values}}
    write_csv(results, tmp_path / "out.csv")
    assert "base,fid,3.0" in (tmp_path / "out.csv").read_text()
