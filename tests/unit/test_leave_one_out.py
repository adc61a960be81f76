"""The fast exact form against the definition, and the properties that follow from it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import DataError
from rewards.fid import Reference, distance_to_reference
from rewards.leave_one_out import leave_one_out_fid
from rewards.moments import Moments


def definition(
    x: np.ndarray, moments: Moments, reference: Reference, decay: float
) -> tuple[np.ndarray, float]:
    """One image left out at a time, each with its own eigenvalues."""

    def fid(features: np.ndarray) -> float:
        mixed = moments.update(features, decay)
        return distance_to_reference(mixed.mean, mixed.cov, reference)

    whole = fid(x)
    return np.array([fid(np.delete(x, i, 0)) for i in range(len(x))]) - whole, whole


def scene(
    dim: int, count: int, history: int, condition: float = 1e2, seed: int = 0
) -> tuple[np.ndarray, Moments, Reference]:
    """Batch, history and reference with spectra of a given condition number, none alike."""
    generator = np.random.default_rng(seed)
    scale = np.logspace(0, -0.5 * np.log10(condition), dim)
    turn = np.linalg.qr(generator.normal(size=(dim, dim)))[0]

    def draw(n: int, stretch: float, shift: float) -> np.ndarray:
        return (generator.normal(size=(n, dim)) * scale * stretch + shift * scale) @ turn

    batch, past, real = draw(count, 0.9, -0.1), draw(history, 1.1, 0.1), draw(6 * dim, 1.0, 0.0)
    return batch, Moments.from_features(past), Reference.from_features(real)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.999])
@pytest.mark.parametrize(("dim", "count"), [(8, 16), (64, 160), (64, 24)])
def test_equals_the_definition(dim: int, count: int, decay: float) -> None:
    x, moments, reference = scene(dim, count, history=5 * dim)
    rewards, fid = leave_one_out_fid(x, moments, reference, decay)
    expected, whole = definition(x, moments, reference, decay)
    assert np.abs(rewards - expected).max() <= 1e-6 * expected.std()
    assert fid == pytest.approx(whole, rel=1e-10)


def test_two_images() -> None:
    x, moments, reference = scene(16, 2, history=50)
    rewards, _ = leave_one_out_fid(x, moments, reference, 0.5)
    expected, _ = definition(x, moments, reference, 0.5)
    np.testing.assert_allclose(rewards, expected, rtol=1e-8)


def test_fewer_images_than_dimensions() -> None:
    """Everything is rank-deficient: history of 10, batch of 12, 32 dimensions."""
    x, moments, reference = scene(32, 12, history=10)
    for decay in (0.0, 0.5):
        rewards, _ = leave_one_out_fid(x, moments, reference, decay)
        expected, _ = definition(x, moments, reference, decay)
        assert np.abs(rewards - expected).max() <= 1e-6 * expected.std()


def test_the_history_is_not_changed() -> None:
    x, moments, reference = scene(8, 16, history=40)
    before = moments.to_bytes()
    leave_one_out_fid(x, moments, reference, 0.5)
    assert moments.to_bytes() == before


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**16), decay=st.floats(0.0, 0.99))
def test_rotation_translation_and_order_change_nothing(seed: int, decay: float) -> None:
    x, moments, reference = scene(6, 15, history=40, seed=seed)
    generator = np.random.default_rng(seed + 1)
    turn = np.linalg.qr(generator.normal(size=(6, 6)))[0]
    shift, order = generator.normal(size=6), generator.permutation(15)
    moved = Moments(
        mean=moments.mean @ turn + shift,
        cov=turn.T @ moments.cov @ turn,
        weight=moments.weight,
        square_weight=moments.square_weight,
    )
    target = Reference(reference.mu @ turn + shift, turn.T @ reference.sigma @ turn)
    rewards, _ = leave_one_out_fid(x, moments, reference, decay)
    again, _ = leave_one_out_fid(x[order] @ turn + shift, moved, target, decay)
    np.testing.assert_allclose(again, rewards[order], rtol=1e-6, atol=1e-9 * np.abs(rewards).max())


def test_scaling_features_scales_rewards_by_the_square() -> None:
    x, moments, reference = scene(6, 15, history=40)
    scaled = Moments(
        mean=3 * moments.mean,
        cov=9 * moments.cov,
        weight=moments.weight,
        square_weight=moments.square_weight,
    )
    rewards, _ = leave_one_out_fid(x, moments, reference, 0.5)
    larger, _ = leave_one_out_fid(
        3 * x, scaled, Reference(3 * reference.mu, 9 * reference.sigma), 0.5
    )
    np.testing.assert_allclose(larger, 9 * rewards, rtol=1e-9)


def test_an_image_of_a_missing_mode_beats_a_duplicate() -> None:
    generator = np.random.default_rng(0)
    left, right = generator.normal(-3, 0.3, (500, 4)), generator.normal(3, 0.3, (500, 4))
    reference = Reference.from_features(np.concatenate([left, right]))
    moments = Moments.from_features(left[:200])  # the generator has lost the right mode
    batch = np.concatenate([np.repeat(left[:1], 7, 0), left[10:18], right[:1]])
    rewards, _ = leave_one_out_fid(batch, moments, reference, 0.5)
    np.testing.assert_allclose(rewards[:7], rewards[0], rtol=1e-9)  # copies get the same
    assert rewards.argmax() == 15
    assert rewards[15] > 0 > rewards[:7].max()


def test_identical_images_stay_finite() -> None:
    _, moments, reference = scene(6, 15, history=40)
    rewards, fid = leave_one_out_fid(np.ones((5, 6)), moments, reference, 0.5)
    assert np.isfinite(rewards).all()
    assert np.isfinite(fid)
    np.testing.assert_allclose(rewards, rewards[0])


def test_bad_input_is_refused() -> None:
    x, moments, reference = scene(6, 15, history=40)
    with pytest.raises(DataError, match="at least 2 images, found 1"):
        leave_one_out_fid(x[:1], moments, reference, 0.5)
    with pytest.raises(DataError, match="features have 5 dimensions, moments 6"):
        leave_one_out_fid(x[:, :5], moments, reference, 0.5)
