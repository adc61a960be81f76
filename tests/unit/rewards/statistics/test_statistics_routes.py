"""Files of statistics, images and features at every option that takes one of them: the right
reader by the content, whatever the name, or what the file is and where it belongs."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import DataError
from learner.config import merge, validate
from learner.data.datasets import load_labels
from learner.preflight import preflight
from learner.rollouts.feature_space import stored_reference
from rewards.reference import main, read_stored
from tests.small_run import plain_miniature

FEATURES = np.random.default_rng(0).normal(size=(200, 64))
MU, SIGMA = FEATURES.mean(0), np.cov(FEATURES, rowvar=False)
IMAGES = np.zeros((20, 8, 8, 3), np.uint8)
MOMENTS = {"mu": MU, "sigma": SIGMA, "count": np.array(200)}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def savez(name: str, **arrays: Any) -> None:
    with Path(name).open("wb") as file:
        np.savez(file, **arrays)


def save(name: str, array: np.ndarray) -> None:
    with Path(name).open("wb") as file:
        np.save(file, array)


STATISTICS = {
    "s.npz": lambda name: savez(name, **MOMENTS),
    "UPPER.NPZ": lambda name: savez(name, **MOMENTS),
    "s.pt": lambda name: torch.save({**MOMENTS, "count": 200}, name),
    "S.PT": lambda name: torch.save({**MOMENTS, "count": 200}, name),
    "npz-called.pt": lambda name: savez(name, **MOMENTS),
    "pt-called.npz": lambda name: torch.save({**MOMENTS, "count": 200}, name),
    "no-suffix": lambda name: savez(name, **MOMENTS),
}
PICTURES = {
    "i.npz": lambda name: savez(name, arr_0=IMAGES, arr_1=np.arange(20) % 10),
    "IMAGES.NPZ": lambda name: savez(name, arr_0=IMAGES),
    "i.npy": lambda name: save(name, IMAGES),
    "IMAGES.NPY": lambda name: save(name, IMAGES),
}
OTHERS = {
    "f.npy": lambda name: save(name, FEATURES),
    "f.npz": lambda name: savez(name, feats=FEATURES),
    "edm.pkl": lambda name: Path(name).write_bytes(pickle.dumps({"fid": {"mu": MU}})),
    "page.npz": lambda name: Path(name).write_text("<!DOCTYPE html><html></html>"),
    "pointer.pt": lambda name: Path(name).write_text("version https://git-lfs.github.com/spec/v1"),
    "folder": lambda name: Path(name).mkdir(),
    "empty.npz": lambda name: Path(name).write_bytes(b""),
}
LOO = "rewards.loo_fid.reference"
SEED = "rewards.loo_fid.seed_from"
HELD = "evaluation.images"


def told(option: str, name: str) -> str:
    """The one problem of a dry run, or nothing."""
    value: Any = name
    for part in reversed(option.split(".")):
        value = {part: value}
    found = preflight(validate(merge(plain_miniature(), value), "test"))
    problems = [problem for problem in found.problems if problem.startswith(option)]
    assert problems == found.problems
    assert len(problems) <= 1
    return "".join(problems)


@pytest.mark.parametrize("option", [LOO, SEED])
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_read_by_any_name(option: str, name: str) -> None:
    STATISTICS[name](name)
    assert stored_reference(name)
    assert told(option, name) == ""
    np.testing.assert_allclose(read_stored(name).reference.sigma, SIGMA)


@pytest.mark.parametrize("name", PICTURES)
def test_images_are_read_by_any_name(name: str) -> None:
    PICTURES[name](name)
    assert told(HELD, name) == ""
    assert main(["--images", name, "--out", "OUT.NPZ", "--features.network", "pixels"]) == 0
    assert read_stored("OUT.NPZ").images == 20
    problem = told(LOO, name)
    assert (problem == "") == name.lower().endswith(".npy")  # images by name, as ever
    if problem:
        assert "holds samples (arrays ['arr_0'" in problem
        assert f"python -m rewards.reference --images {name} --out" in problem
    assert "images" in told(SEED, name)


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_where_images_belong(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    STATISTICS[name](name)
    problem = told(HELD, name)
    status = main(["--images", name, "--out", "o.npz", "--features.network", "pixels"])
    text = capsys.readouterr().err
    if name.startswith(("s.pt", "S.PT", "pt-")):
        assert "found a PyTorch file" in problem
        assert "found a PyTorch file" in text
    else:
        assert "and no images, and the judge's networks are convnet and pixels" in problem
        assert "these are moments of features, not images" in text
        assert "rewards.loo_fid.reference" in text
    assert status == 2


@pytest.mark.parametrize("option", [LOO, SEED, HELD])
@pytest.mark.parametrize("name", OTHERS)
def test_others_are_refused_everywhere(
    option: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    OTHERS[name](name)
    problem = told(option, name)
    assert problem.startswith(f"{option}: {name}: ")
    expected = {
        "f.npy": "features",
        "f.npz": "found ['feats']" if option == HELD else "features of 200 images in 64",
        "edm.pkl": "pickle",
        "page.npz": "a web page; the download went to a page about the file",
        "pointer.pt": "git lfs pull",
        "folder": "no images in it or below" if option == HELD else "found a folder",
        "empty.npz": "an empty file",
    }[name]
    assert expected in problem
    for unsafe in ("allow_pickle", "weights_only", "255 *"):
        assert unsafe not in problem
    if name != "folder":
        assert main(["--images", name, "--out", "o.npz", "--features.network", "pixels"]) == 2
        assert name in capsys.readouterr().err


@pytest.mark.parametrize("name", ["none.npz", "NONE.PT", "none.pkl", "none"])
@pytest.mark.parametrize("option", [LOO, SEED, HELD])
def test_a_file_that_is_not_there(option: str, name: str) -> None:
    problem = told(option, name)
    assert "no such file" in problem or "found none at" in problem
    assert name in problem


@pytest.mark.parametrize("labels", [np.array(["a", "b"]), np.zeros(3), np.zeros((2, 2), int)])
def test_labels_that_are_no_classes(labels: np.ndarray) -> None:
    savez("i.npz", arr_0=IMAGES, arr_1=labels)
    with pytest.raises(DataError, match=r"i\.npz: arr_1 must hold \(20,\) integers"):
        load_labels("i.npz")
