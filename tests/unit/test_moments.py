from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import CheckpointError, DataError
from rewards.moments import Moments


def features(count: int, dim: int = 5, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(3.0, 2.0, (count, dim)) * np.arange(1, dim + 1)


def assert_equal(a: Moments, b: Moments, tolerance: float = 1e-12) -> None:
    for name in ("mean", "cov", "weight", "square_weight"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=tolerance, atol=1e-10)


def test_moments_are_numpys() -> None:
    x = features(40)
    moments = Moments.from_features(x)
    np.testing.assert_allclose(moments.mean, x.mean(0))
    np.testing.assert_allclose(moments.cov, np.cov(x.T, ddof=0))
    np.testing.assert_allclose(moments.m2, x.T @ x / 40)
    assert moments.weight == moments.effective_size == 40


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=6), st.randoms())
def test_merging_in_any_order_is_one_batch(sizes: list[int], order) -> None:
    x = features(sum(sizes))
    parts = [Moments.from_features(part) for part in np.split(x, np.cumsum(sizes)[:-1])]
    order.shuffle(parts)
    while len(parts) > 1:  # any tree of merges
        index = order.randrange(len(parts) - 1)
        parts[index : index + 2] = [parts[index].merge(parts[index + 1])]
    assert_equal(parts[0], Moments.from_features(x))


def test_update_mixes_raw_moments() -> None:
    old, batch = Moments.from_features(features(30)), features(8, seed=1)
    mixed, new = old.update(batch, decay=0.7), Moments.from_features(batch)
    np.testing.assert_allclose(mixed.m1, 0.7 * old.m1 + 0.3 * new.m1)
    np.testing.assert_allclose(mixed.m2, 0.7 * old.m2 + 0.3 * new.m2)
    assert mixed.weight == 1


def test_effective_size_of_a_long_average() -> None:
    """N (1 + b) / (1 - b) for batches of N and decay b."""
    moments = Moments.from_features(features(16))
    for seed in range(60):
        moments = moments.update(features(16, seed=seed), decay=0.5)
    assert moments.effective_size == pytest.approx(16 * 1.5 / 0.5)


def test_decay_zero_is_the_batch_alone() -> None:
    batch = features(8, seed=1)
    mixed = Moments.from_features(features(30)).update(batch, decay=0.0)
    np.testing.assert_allclose(mixed.cov, Moments.from_features(batch).cov)


def test_far_from_the_origin_nothing_is_lost() -> None:
    """Raw second moments would leave four digits of this covariance."""
    x = features(50)
    moved = Moments.from_features(x + 1e6).merge(Moments.from_features(x[:10] + 1e6))
    near = Moments.from_features(x).merge(Moments.from_features(x[:10]))
    np.testing.assert_allclose(moved.cov, near.cov, rtol=1e-8)


def test_bytes_round_trip_is_bitwise() -> None:
    moments = Moments.from_features(features(9)).update(features(4), 0.3)
    back = Moments.from_bytes(moments.to_bytes())
    assert np.array_equal(back.mean, moments.mean)
    assert np.array_equal(back.cov, moments.cov)
    assert (back.weight, back.square_weight) == (moments.weight, moments.square_weight)


@pytest.mark.parametrize("data", [b"", b"\x00", b"\x80", b"not msgpack at all"])
def test_foreign_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="these are not stored moments"):
        Moments.from_bytes(data)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((0, 3)), "non-empty"),
        (np.zeros(3), r"found shape \(3,\)"),
        (np.array([[1.0], [np.nan]]), r"1 of 2 images are not finite: \[1\]"),
    ],
)
def test_bad_features_are_refused(x: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Moments.from_features(x)


def test_dimensions_must_agree() -> None:
    with pytest.raises(DataError, match="5 and 4 dimensions"):
        Moments.from_features(features(9)).merge(Moments.from_features(features(9, 4)))
