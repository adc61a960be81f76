"""Real images by name: splits, and what is said where their package or a split is missing."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import ConfigError, DataError
from learner.data import mnist
from learner.data.datasets import has_labels, iterate_images, load_images, load_labels, open_images
from learner.data.image_checks import check_there
from learner.data.named_sets import NAMES, SETS, is_named, read_named
from learner.data.splits import stratified_part
from learner.preflight import preflight
from tests.small_run import small_config

needs_mnist = pytest.mark.skipif(
    importlib.util.find_spec(mnist.PACKAGE) is None, reason="needs the extra mnist"
)


def packaged(folder: Path, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package in a folder, with these rows as its file."""
    path = folder / "stand_in" / mnist.FILE
    path.parent.mkdir(parents=True)
    (folder / "stand_in" / "__init__.py").write_text("raise AssertionError('imported')")
    text = "\n".join(",".join(map(str, row)) for row in rows)
    path.write_bytes(gzip.compress(text.encode()))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(mnist, "PACKAGE", "stand_in")


def test_names() -> None:
    assert NAMES == ("digits:train", "digits:held-out", "mnist:train", "mnist:held-out")
    assert is_named("mnist:other")  # an unknown split of a known set is no path
    assert not any(map(is_named, ("mnist", "minst:train", "/data/digits", "")))
    with pytest.raises(DataError, match="'digits:test': split must be 'train' or 'held-out'"):
        read_named("digits:test")
    with pytest.raises(Exception, match="did you mean 'mnist:train'"):
        check_there("minst:train")


def test_a_split_is_stratified_and_complete() -> None:
    gray = np.arange(60, dtype=np.uint8).reshape(60, 1, 1)
    labels = np.repeat([0, 1, 2], 20)
    train, held_out = (stratified_part(gray, labels, part, 45) for part in ("train", "held-out"))
    assert sorted([*train[0][:, 0, 0, 0], *held_out[0][:, 0, 0, 0]]) == list(range(60))
    assert np.bincount(train[1]).tolist() == [15, 15, 15]
    assert all((images[:, 0, 0, 2] // 20 == classes).all() for images, classes in (train, held_out))
    with pytest.raises(ValueError, match="found 'test'"):
        stratified_part(gray, labels, "test", 45)  # type: ignore[arg-type]


@needs_mnist
def test_mnist() -> None:
    train, held_out = load_images("mnist:train"), load_images("mnist:held-out")
    assert train.shape == (4000, 28, 28, 3)
    assert held_out.shape == (1000, 28, 28, 3)
    assert np.bincount(load_labels("mnist:train")).tolist() == [400] * 10
    assert load_labels("mnist:held-out")[:8].tolist() == FIRST
    assert (train[..., 0] == train[..., 2]).all()
    assert train.max() == 255
    assert np.median(train) == 0  # white on black, as the digits
    seen = {image.tobytes() for image in train}
    assert not any(image.tobytes() in seen for image in held_out)
    opened = open_images("mnist:held-out")
    assert opened.size == (28, 28)
    assert has_labels(opened)
    assert sum(len(batch) for batch in iterate_images("mnist:held-out", 300)) == 1000


FIRST = [6, 3, 0, 8, 8, 3, 0, 0]


def test_mnist_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist, "PACKAGE", "no_such_package")
    missing = r"no_such_package, which is not installed: pip install 'tessera-rl\[mnist\]'"
    for read in (load_images, load_labels, open_images):
        with pytest.raises(ConfigError, match=missing):
            read("mnist:train")
    config = small_config(
        evaluation={"images": "mnist:held-out"},
        rewards={"loo_fid": {"reference": "mnist:train"}},
        real={"weight": 0.1, "source": "mnist:train"},
    )
    told = [problem for problem in preflight(config).problems if "tessera-rl[mnist]" in problem]
    assert {problem.partition(":")[0] for problem in told} == {
        "evaluation.images",
        "rewards.loo_fid.reference",
        "real.source",
    }


def test_mnist_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is read without importing the package, and checked."""
    packaged(tmp_path, np.zeros((3, 785), int), monkeypatch)
    with pytest.raises(ConfigError, match=r"expected an array \(5000, 785\), found \(3, 785\)"):
        load_images("mnist:train")
    file = tmp_path / "stand_in" / mnist.FILE
    file.write_bytes(file.read_bytes()[:-12])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_images("mnist:train")
    file.unlink()
    with pytest.raises(ConfigError, match="found no file"):
        load_images("mnist:train")


def test_images_of_a_size_that_the_network_does_not_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        SETS, "mnist", lambda _: (np.zeros((20, 28, 28, 3), np.uint8), np.arange(20) % 10)
    )
    config = small_config(
        evaluation={"images": "mnist:held-out"}, rewards={"loo_fid": {"reference": "mnist:train"}}
    )
    told = preflight(config).problems
    assert [problem.partition(":")[0] for problem in told] == [
        "rewards.loo_fid.reference",
        "evaluation.images",
    ]
    for problem in told:
        assert "expected images of 8 x 8, as the feature network" in problem
        assert "found 28 x 28" in problem
