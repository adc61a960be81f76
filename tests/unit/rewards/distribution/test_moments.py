from __future__ import annotations

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import CheckpointError, DataError
from cluster.io.checksum import add_checksum
from rewards.distribution.moments import (
    Moments,
    MomentSums,
    SlidingWindow,
    decay_for,
    effective_images,
)


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
def test_other_bytes_are_refused(data: bytes) -> None:
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


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=9),
    st.sampled_from([0.0, 1.0, 1e3, 1e6]),
    st.randoms(),
)
def test_sums_of_servers_are_the_same_in_any_order(sizes: list[int], far: float, order) -> None:
    """To 1e-12 of the covariance, also where the mean is a million deviations away."""
    x = features(sum(sizes)) + far
    shift = x[0]  # all servers share it
    parts = [MomentSums.about(shift).add(part) for part in np.split(x, np.cumsum(sizes)[:-1])]
    order.shuffle(parts)
    while len(parts) > 1:
        index = order.randrange(len(parts) - 1)
        parts[index : index + 2] = [parts[index].merge(parts[index + 1])]
    ours, whole = parts[0].moments(), MomentSums.about(shift).add(x).moments()
    scale = np.abs(whole.cov).max()
    np.testing.assert_allclose(ours.cov, whole.cov, rtol=0, atol=1e-12 * scale)
    np.testing.assert_allclose(ours.mean, whole.mean, rtol=1e-14, atol=1e-12 * scale**0.5)
    assert ours.weight == ours.effective_size == len(x)
    np.testing.assert_allclose(whole.cov, np.cov(x.T, ddof=0), rtol=0, atol=1e-9 * (scale + 1))


def test_sums_about_different_points_do_not_add_up() -> None:
    a, b = (MomentSums.about(np.full(5, shift)).add(features(9)) for shift in (0.0, 1.0))
    with pytest.raises(DataError, match="different shifts do not add up: merge their moments"):
        a.merge(b)
    both = a.moments().merge(b.moments())
    np.testing.assert_allclose(both.cov, a.moments().cov, rtol=1e-12)
    with pytest.raises(DataError, match="cannot add 4 dimensions to sums of 5"):
        a.add(features(9, 4))


def test_sums_of_nothing_are_empty_moments() -> None:
    assert MomentSums.about(np.ones(3)).moments().weight == 0


def test_empty_moments_are_neutral() -> None:
    empty, some = Moments.empty(5), Moments.from_features(features(9))
    assert empty.effective_size == 0
    assert_equal(empty.merge(some), some)
    assert_equal(some.merge(empty), some)
    assert empty.merge(empty).weight == 0
    assert empty.normalised() is empty


def test_an_average_started_empty_is_debiased() -> None:
    """b = .6 after three batches: weights .36, .6, 1 over their sum; no half-scale start."""
    batches = [features(7, seed=seed) for seed in range(3)]
    moments = Moments.empty(5)
    for batch in batches:
        moments = moments.update(batch, 0.6)
    weights = np.array([0.36, 0.6, 1.0])
    parts = [Moments.from_features(batch) for batch in batches]
    expected = sum(w * part.m2 for w, part in zip(weights / weights.sum(), parts))
    np.testing.assert_allclose(moments.m2, expected)
    assert moments.weight == pytest.approx(1 - 0.6**3)
    assert moments.effective_size == pytest.approx(7 * weights.sum() ** 2 / (weights**2).sum())
    assert_equal(Moments.empty(5).update(batches[0], 0.6).normalised(), _full(parts[0]))


def _full(moments: Moments) -> Moments:
    return Moments(
        mean=moments.mean,
        cov=moments.cov,
        weight=1.0,
        square_weight=moments.square_weight / moments.weight**2,
    )


def test_a_filling_average_can_be_updated_by_its_share() -> None:
    """What `leave_one_out_fid`, which knows no weights, is given."""
    filling = Moments.empty(5).update(features(7), 0.6)
    batch = features(8, seed=1)
    share = filling.history_share(0.6)
    assert share == pytest.approx(0.6 * 0.4 / (0.6 * 0.4 + 0.4))
    by_share = filling.normalised().update(batch, share)
    np.testing.assert_allclose(by_share.cov, filling.update(batch, 0.6).cov)
    full = Moments.from_features(features(30))
    assert full.history_share(0.6) == 0.6
    assert full.normalised() is full


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_an_impossible_decay_is_refused(decay: float) -> None:
    message = r"decay must be in \[0, 1\), found"
    for moments in (Moments.empty(5), Moments.from_features(features(9))):
        with pytest.raises(ValueError, match=message):
            moments.update(features(9), decay)
    with pytest.raises(ValueError, match=message):
        effective_images(decay, 16)


@given(st.floats(0, 0.9999), st.integers(1, 4096))
def test_decay_and_effective_images_are_inverse(decay: float, batch: int) -> None:
    assert decay_for(effective_images(decay, batch), batch) == pytest.approx(decay, abs=1e-9)


def test_no_average_holds_less_than_a_batch() -> None:
    assert effective_images(0.5, 160) == 480
    assert decay_for(160, 160) == 0
    for images in (159, float("inf")):
        with pytest.raises(ValueError, match="over batches of 160 images cannot hold"):
            decay_for(images, 160)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 40))
def test_a_sliding_window_is_its_newest_images(sizes: list[int], length: int) -> None:
    """However long it slides: nothing is left of what went, not even rounding."""
    x = features(sum(sizes)) + 1e4
    window = SlidingWindow()
    for batch in np.split(x, np.cumsum(sizes)[:-1]):
        window = window.push(batch, length)
    kept = int(window.effective_size)
    assert min(length, len(x)) <= kept <= length + max(sizes)
    assert kept - len(window.batches[0]) < length or len(window.batches) == 1
    expected = Moments.from_features(x[-kept:])
    np.testing.assert_allclose(window.moments().cov, expected.cov, rtol=0, atol=1e-10)
    assert window.moments().weight == kept


def test_windows_refuse_what_does_not_fit() -> None:
    with pytest.raises(DataError, match="the window is empty"):
        SlidingWindow().moments()
    with pytest.raises(DataError, match="holds features of 5 dimensions, found 4"):
        SlidingWindow().push(features(9), 20).push(features(9, 4), 20)
    with pytest.raises(DataError, match="non-empty"):
        SlidingWindow().push(np.zeros((0, 5)), 20)


def test_the_window_keeps_its_own_copy() -> None:
    x = features(9)
    window = SlidingWindow().push(x, 20)
    x[:] = 0
    np.testing.assert_array_equal(window.batches[0], features(9))


@pytest.mark.parametrize("place", [0.3, 0.6, 0.95])
def test_damaged_bytes_are_refused(place: float) -> None:
    data = bytearray(Moments.from_features(features(9)).to_bytes())
    data[int(place * len(data))] ^= 1
    with pytest.raises(CheckpointError, match="checksum does not match: the bytes are damaged"):
        Moments.from_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="these are not stored moments"):
        Moments.from_bytes(bytes(data[:-9]))


def test_bytes_of_older_checkpoints_are_read() -> None:
    moments = Moments.from_features(features(9))
    outer = msgpack.unpackb(moments.to_bytes())
    old = {"format": 2, "sha256": outer["sha256"], "fields": outer["body"]}
    assert np.array_equal(Moments.from_bytes(msgpack.packb(old)).cov, moments.cov)
    with pytest.raises(CheckpointError, match="checksum does not match"):
        Moments.from_bytes(msgpack.packb(old | {"sha256": bytes(32)}))
    odd = msgpack.packb(msgpack.unpackb(outer["body"]) | {"dim": 4})
    with pytest.raises(CheckpointError, match="cannot reshape"):
        Moments.from_bytes(add_checksum(odd))
