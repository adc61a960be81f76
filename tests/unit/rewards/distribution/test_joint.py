from __future__ import annotations

import numpy as np
import pytest

from cluster.errors import DataError
from rewards.distribution.joint import class_table, equal_trace_weight, joint_features
from rewards.distribution.leave_one_out import leave_one_out_fid
from rewards.distribution.moments import Moments
from rewards.distribution.reference import Reference


def test_features_and_weighted_embeddings_side_by_side() -> None:
    joined = joint_features(np.ones((3, 2), np.float32), np.full((3, 4), 2.0), 1.5)
    np.testing.assert_array_equal(joined, [[1, 1, 3, 3, 3, 3]] * 3)
    assert joined.dtype == np.float64


@pytest.mark.parametrize("shapes", [((3, 2), (4, 2)), ((3,), (3, 2)), ((3, 2), (3,))])
def test_rows_must_be_of_the_same_images(shapes) -> None:
    with pytest.raises(DataError, match=r"of the same images, found shapes \("):
        joint_features(np.zeros(shapes[0]), np.zeros(shapes[1]), 1.0)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_an_impossible_weight_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        joint_features(np.zeros((3, 2)), np.zeros((3, 2)), weight)


def test_one_hot_is_centred() -> None:
    embedded = class_table(3)[[2, 0]]
    np.testing.assert_allclose(embedded, np.array([[-1, -1, 2], [2, -1, -1]]) / 3)


@pytest.mark.parametrize(("classes", "dim"), [(1000, 64), (10, 9), (2, 1)])
def test_a_projection_is_centred_and_the_same_in_every_direction(classes: int, dim: int) -> None:
    table, one_hot = class_table(classes, dim), class_table(classes)
    assert table.shape == (classes, dim)
    np.testing.assert_allclose(table.mean(0), 0, atol=1e-12)
    cov = np.cov(table.T, ddof=0).reshape(dim, dim)
    np.testing.assert_allclose(cov, np.eye(dim) * (classes - 1) / classes / dim, atol=1e-12)
    assert np.trace(cov) == pytest.approx(np.trace(np.cov(one_hot.T, ddof=0)))


def test_a_projection_is_fixed_by_its_seed() -> None:
    np.testing.assert_array_equal(class_table(20, 4, seed=1), class_table(20, 4, seed=1))
    assert not np.allclose(class_table(20, 4, seed=1), class_table(20, 4, seed=2))


def test_impossible_embeddings_are_refused() -> None:
    with pytest.raises(ValueError, match="needs at least 2, found 1"):
        class_table(1)
    for dim in (5, -1):
        with pytest.raises(ValueError, match=f"5 classes embed into 1 to 4 .* found {dim}"):
            class_table(5, dim)


def test_equal_traces() -> None:
    weight = equal_trace_weight(np.diag([6.0, 2.0]), np.diag([1.0, 0.5, 0.5]))
    assert weight == 2
    with pytest.raises(DataError, match=r"must both vary .* found traces 8 and 0"):
        equal_trace_weight(np.diag([6.0, 2.0]), np.zeros((3, 3)))


def test_an_image_of_the_wrong_class_is_distinguished() -> None:
    """Every set of features is as the reference's; only two images have changed their classes. The
    marginal reward cannot see it, the joint one puts these two last."""
    generator = np.random.default_rng(0)
    means = np.array([[4.0, 0], [-4, 0], [0, 4]])

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        classes = np.arange(count) % 3
        return means[classes] + generator.normal(size=(count, 2)), classes

    def joined(features: np.ndarray, classes: np.ndarray) -> np.ndarray:
        return joint_features(features, class_table(3)[classes], 3.0)

    reference, history = joined(*draw(600)), joined(*draw(300))
    features, classes = draw(30)
    classes[[0, 1]] = classes[[1, 0]]
    rewards, _ = leave_one_out_fid(
        joined(features, classes),
        Moments.from_features(history),
        Reference.from_features(reference),
        0.5,
    )
    assert set(np.argsort(rewards)[:2]) == {0, 1}


def test_embeddings_alone_reward_all_images_of_a_class_alike() -> None:
    """So centring on the group takes away what the fixed block of the conditions says."""
    classes = np.array([0, 0, 0, 1, 1, 2])
    embedded = class_table(3)[classes]
    history = Moments.from_features(class_table(3)[np.arange(30) % 3])
    reference = Reference.from_features(class_table(3)[np.arange(90) % 3])
    rewards, _ = leave_one_out_fid(embedded, history, reference, 0.5)
    assert np.ptp(rewards[:3]) < 1e-12
    assert np.ptp(rewards[3:5]) < 1e-12
