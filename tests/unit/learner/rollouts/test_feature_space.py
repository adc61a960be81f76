from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import ConfigError, DataError
from cluster.messages import MAIN_SPACE, Condition
from learner.config import RunConfig
from learner.data.datasets import load_labels
from learner.rollouts import feature_space
from learner.rollouts.feature_space import RewardSpace, set_reference
from rewards.distribution.moments import Moments
from rewards.distribution.reference import Reference
from tests.small_run import small_config

DIM, CLASSES = 3, 10


class Bench:
    """The part of a fleet that a reference needs: features are the images' mean colours."""

    def __init__(self) -> None:
        self.moments = self
        self.reference: Reference | None = None

    def fingerprint(self, panel: str, space: str) -> str:
        return "colours"

    def feature_dim(self, panel: str, space: str) -> int:
        return DIM

    def serve_while(self, work: Callable[[], Any]) -> Any:
        return work()

    def features(self, batches: Iterable[np.ndarray], panel: str) -> dict[str, np.ndarray]:
        images = np.concatenate([*batches])
        brightness = images.mean((1, 2, 3))
        return {MAIN_SPACE: np.stack([brightness, brightness**2, images[:, 0, 0, 0]], 1)}

    def set_references(
        self, references: Mapping[str, Reference], fingerprints: Mapping[str, str]
    ) -> None:
        assert fingerprints == {MAIN_SPACE: "colours"}
        self.reference = references[MAIN_SPACE]


def config(**loo_fid: Any) -> RunConfig:
    return small_config(rewards={"loo_fid": loo_fid})


def classes(*indices: int) -> list[Condition]:
    return [Condition(text="", class_index=index) for index in indices]


def set_on(bench: Bench, run: RunConfig) -> RewardSpace:
    return set_reference(run, bench)[MAIN_SPACE]  # type: ignore[arg-type]


def test_features_alone() -> None:
    bench = Bench()
    space = set_on(bench, config())
    features = np.ones((4, DIM))
    assert space(features, classes(0, 1, 2, 3)) is features
    assert bench.reference is not None
    assert bench.reference.dim == DIM
    assert bench.reference.fingerprint == "colours"


def test_joint_features_of_equal_trace() -> None:
    bench = Bench()
    space = set_on(bench, config(joint=True))
    assert bench.reference is not None
    assert bench.reference.dim == DIM + CLASSES
    traces = np.diag(bench.reference.sigma)
    assert traces[:DIM].sum() == pytest.approx(traces[DIM:].sum())
    joint = space(np.zeros((2, DIM)), classes(0, 9))
    assert joint.shape == (2, DIM + CLASSES)
    assert joint[0, DIM] == pytest.approx(space.weight * 0.9)
    assert (space(np.zeros((2, DIM)), classes(3, 3))[0] == joint[0]).sum() < DIM + CLASSES


def test_captions_have_no_class_to_join() -> None:
    space = set_on(Bench(), config(joint=True))
    with pytest.raises(DataError, match="'a cat' is a caption without a class"):
        space(np.zeros((2, DIM)), [*classes(1), Condition(text="a cat")])


def test_weight_and_dimensions_can_be_chosen() -> None:
    bench = Bench()
    space = set_on(bench, config(joint=True, joint_weight=2.5, joint_dim=4))
    assert space.weight == 2.5
    assert bench.reference is not None
    assert bench.reference.dim == DIM + 4


def test_a_file_without_joint_moments_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "reference.npz"
    moments = Moments.from_features(np.random.default_rng(0).normal(size=(50, DIM)))
    np.savez(file, mu=moments.mean, sigma=moments.cov)
    assert set_on(Bench(), config(reference=str(file))) == RewardSpace()
    with pytest.raises((ConfigError, DataError), match="joint"):
        set_on(Bench(), config(reference=str(file), joint=True))


def test_labels_go_with_images(tmp_path: Path) -> None:
    assert len(load_labels("digits:train")) == 1000
    file = tmp_path / "samples.npz"
    np.savez(file, arr_0=np.zeros((3, 8, 8, 3), np.uint8), arr_1=np.array([2, 0, 1]))
    assert load_labels(str(file)).tolist() == [2, 0, 1]
    np.savez(file, arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match="no classes, array 'arr_1'"):
        load_labels(str(file))


# References of another dimension.


def foreign(path: Path, dim: int, **arrays: Any) -> str:
    """Moments as other tools write them: nothing says of which network."""
    np.savez(path, mu=np.zeros(dim), sigma=np.eye(dim), **arrays)
    return str(path)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_a_reference_of_another_dimension_is_not_set(tmp_path: Path, covariance: str) -> None:
    bench, file = Bench(), foreign(tmp_path / "fid.npz", 5)
    with pytest.raises(DataError, match=r"fid.npz: expected .* 3 .* of colours have, found 5"):
        set_on(bench, config(reference=file, covariance=covariance))
    assert bench.reference is None


def test_joint_moments_of_another_dimension_are_not_set(tmp_path: Path) -> None:
    joint = {"joint_mu": np.zeros(6), "joint_sigma": np.eye(6), "joint_weight": np.array(1.0)}
    file = foreign(tmp_path / "r.npz", 3, joint_table=np.eye(CLASSES), **joint)
    with pytest.raises(DataError, match=r"expected moments of 13 dimensions.* found 6"):
        set_on(Bench(), config(reference=file, joint=True))


@pytest.mark.parametrize(("images", "told"), [(3, True), (4, False), (None, False)])
def test_few_images_are_reported(
    tmp_path: Path, images: int | None, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    known = {} if images is None else {"images": np.array(images)}
    file = foreign(tmp_path / "r.npz", DIM, **known)
    with caplog.at_level("WARNING", "learner.rollouts.feature_space"):
        set_on(Bench(), config(reference=file))
        assert ("r.npz has 3 images, which give no full covariance in 3" in caplog.text) == told
        caplog.clear()
        set_on(Bench(), config(reference=file, covariance="diagonal"))
        assert not caplog.text


def test_classes_that_the_policy_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    given = config(joint=True)
    for labels, message in {
        tuple(range(11)) * 91: "1000 images, but 1001 classes",
        (*range(11), *[0] * 989): "expected classes 0 to 9, .* found 0 to 10",
        (-1, *[0] * 999): "found -1 to 0",
    }.items():
        monkeypatch.setattr(feature_space, "load_labels", lambda _, labels=labels: np.array(labels))
        with pytest.raises(DataError, match=message):
            set_on(Bench(), given)
