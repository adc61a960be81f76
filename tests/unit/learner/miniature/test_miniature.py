"""The miniature's data, networks and the script that makes them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress

from cluster.errors import ConfigError
from learner.config import DEFAULT_PRESET, load_preset, to_dict, validate
from learner.data.digits import augment, digits, to_pixels
from learner.miniature.build import NETWORKS, BuildConfig, Builder, main, with_networks
from learner.miniature.systems.digits import digits_by_class
from learner.miniature.systems.registry import SYSTEMS, system_of, system_of_preset
from learner.miniature.systems.system import Job, Network, System
from tests.reduced import presets


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
    """Those of classes, and those that captions add."""
    for folder, most, networks in ((NETWORKS, 12e6, 14), (NETWORKS / "captions", 4e6, 4)):
        files = [file for file in folder.rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) <= most
        assert len([file for file in files if file.suffix == ".safetensors"]) == networks


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
        "autoencoder.safetensors",
        "clip/open_clip_model.safetensors",
        "preference/open_clip_model.safetensors",
    }  # the judge has a seed of its own


def record(job: Job) -> None:
    """Train nothing: write two random numbers, of initial weights and of the data."""
    batches = job.batches()
    job.write(torch.nn.Linear(1, 1, bias=False), {"drawn": batches.draw(1)[1].tolist()})


def test_a_network_does_not_depend_on_what_is_built_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those that are there may be kept, and the judge left out."""
    of = partial(Network, data=digits_by_class, train=record, steps=1)
    networks = of(name="a", file="a"), of(name="b", file="in/b"), of(name="c", file="c")
    judge = of(name="judge", file="judge", of_judge=True)
    system = System(name="it", preset="miniature", networks=(*networks, judge), places={})
    monkeypatch.setitem(SYSTEMS, "it", system)

    def built(seed: int = 0, **options: bool) -> dict[str, bytes]:
        config = BuildConfig(system="it", out=tmp_path, seed=seed, num_threads=1)
        with Progress(disable=True) as progress:
            Builder(config, progress).build(**options)
        files = sorted(tmp_path.rglob("*"))
        return {str(f.relative_to(tmp_path)): f.read_bytes() for f in files if f.is_file()}

    first = built(judge=False)
    assert list(first) == ["a", "c", "in/b"]
    assert len(set(first.values())) == 3
    (tmp_path / "in" / "b").unlink()
    (tmp_path / "a").write_bytes(b"kept")
    again = built(keep=True)
    assert again == {**first, "a": b"kept", "judge": again["judge"]}
    other = built(seed=1)
    assert [name for name in other if other[name] == again[name]] == ["judge"]


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_are_whole(name: str, tmp_path: Path) -> None:
    """Unique names and files, tokenizers before what reads them, a preset that names exactly the
    networks."""
    system = system_of(name)
    assert system.preset in presets()
    assert system_of_preset(system.preset) is system
    for key in ("name", "file"):
        found = [getattr(network, key) for network in system.networks]
        assert len(set(found)) == len(found)
    shipped, moved = to_dict(load_preset(system.preset)), with_networks(tmp_path, system.preset)
    validate(moved, "test")
    built = {network.file for network in system.networks}
    for place in strings(system.places):
        assert place in built or any(file.startswith(f"{place}/") for file in built)
    assert strings(moved) - strings(shipped) == {str(tmp_path / p) for p in strings(system.places)}


def strings(values: object) -> set[str]:
    """All texts in nested values."""
    if isinstance(values, dict):
        return set().union(*map(strings, values.values()))
    return {values} if isinstance(values, str) else set()


def test_systems_and_presets_that_are_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--system", "lamagen", "--out", str(tmp_path / "out")]) == 2
    assert "did you mean 'llamagen'?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="no system has the preset 'paper-fixed'"):
        with_networks(tmp_path, "paper-fixed")
    assert system_of_preset(DEFAULT_PRESET).name == "llamagen"
