"""What must hold of leave-one-out rewards whatever the data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.distribution.history_basis import HistoryBasis
from rewards.distribution.leave_one_out import leave_one_out_fid
from rewards.distribution.moments import Moments
from rewards.distribution.reference import Reference
from tests.unit.leave_one_out_oracle import Scene, scene

Rewards = Callable[[Scene, float], np.ndarray]


def exact(s: Scene, decay: float) -> np.ndarray:
    return leave_one_out_fid(s.x, s.moments, s.reference, decay)[0]


def influence(s: Scene, decay: float) -> np.ndarray:
    return leave_one_out_fid(s.x, s.moments, s.reference, decay, method="influence")[0]


def diagonal(s: Scene, decay: float) -> np.ndarray:
    return leave_one_out_fid(s.x, s.moments, s.reference, decay, covariance="diagonal")[0]


def from_basis(s: Scene, decay: float) -> np.ndarray:
    """Batches of few images only."""
    return HistoryBasis.of(s.moments, s.reference).leave_one_out([], s.x, decay)[0]


FORMS = [exact, influence, diagonal]
SOME = settings(deadline=None, max_examples=20)
seeds, decays = st.integers(0, 2**16), st.floats(0.0, 0.99)


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-7) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def moved(s: Scene, turn: np.ndarray, shift: np.ndarray) -> Scene:
    return Scene(s.x @ turn + shift, s.past @ turn + shift, s.real @ turn + shift)


@SOME
@given(seed=seeds, decay=decays, distance=st.sampled_from([0.0, 1.0, 1e3]))
@pytest.mark.parametrize("rewards", [exact, influence])
def test_rotation_and_translation_change_nothing(
    rewards: Rewards, seed: int, decay: float, distance: float
) -> None:
    s = scene(6, 15, history=40, seed=seed)
    generator = np.random.default_rng(seed + 1)
    turn = np.linalg.qr(generator.normal(size=(6, 6)))[0]
    close(rewards(moved(s, turn, distance * generator.normal(size=6)), decay), rewards(s, decay))


@SOME
@given(seed=seeds, decay=st.floats(0.5, 0.99))
def test_rotation_and_translation_change_nothing_for_a_basis(seed: int, decay: float) -> None:
    s = scene(24, 6, history=100, seed=seed)
    generator = np.random.default_rng(seed + 1)
    turn = np.linalg.qr(generator.normal(size=(24, 24)))[0]
    close(from_basis(moved(s, turn, generator.normal(size=24)), decay), from_basis(s, decay))


@SOME
@given(seed=seeds, decay=decays)
@pytest.mark.parametrize("rewards", FORMS)
def test_rewards_follow_their_images(rewards: Rewards, seed: int, decay: float) -> None:
    s = scene(6, 15, history=40, seed=seed)
    order = np.random.default_rng(seed + 1).permutation(15)
    close(rewards(Scene(s.x[order], s.past, s.real), decay), rewards(s, decay)[order], 1e-9)


@SOME
@given(seed=seeds, decay=decays, scale=st.sampled_from([1e-2, 3.0, 1e3]))
@pytest.mark.parametrize("rewards", [exact, influence])
def test_scaling_features_scales_rewards_by_the_square(
    rewards: Rewards, seed: int, decay: float, scale: float
) -> None:
    s = scene(6, 15, history=40, seed=seed)
    larger = rewards(Scene(scale * s.x, scale * s.past, scale * s.real), decay)
    close(larger, scale**2 * rewards(s, decay), 1e-9)


@pytest.mark.parametrize("rewards", FORMS)
def test_an_image_of_a_missing_mode_beats_a_duplicate(rewards: Rewards) -> None:
    generator = np.random.default_rng(0)
    left, right = generator.normal(-3, 0.3, (500, 4)), generator.normal(3, 0.3, (500, 4))
    batch = np.concatenate([np.repeat(left[:1], 7, 0), left[10:18], right[:1]])
    # The generator has lost the right mode.
    r = rewards(Scene(batch, left[:200], np.concatenate([left, right])), 0.5)
    close(r[:7], np.repeat(r[:1], 7))
    assert r.argmax() == 15
    assert r[15] > 0 > r[:7].max()


@SOME
@given(seed=seeds, decay=decays, copies=st.integers(2, 6))
@pytest.mark.parametrize("rewards", FORMS)
def test_copies_get_the_same(rewards: Rewards, seed: int, decay: float, copies: int) -> None:
    s = scene(6, 12, history=40, seed=seed)
    r = rewards(Scene(np.concatenate([s.x, np.repeat(s.x[:1], copies, 0)]), s.past, s.real), decay)
    np.testing.assert_allclose(r[12:], r[0], atol=1e-9 * np.abs(r).max())


@SOME
@given(seed=seeds, decay=decays, count=st.integers(2, 30), history=st.integers(2, 40))
def test_first_orders_of_a_batch_sum_to_zero(
    seed: int, decay: float, count: int, history: int
) -> None:
    r = influence(scene(8, count, history, seed=seed), decay)
    assert abs(r.sum()) <= 1e-10 * np.abs(r).sum()


@SOME
@given(seed=seeds)
def test_a_perfect_generator_earns_second_orders_only(seed: int) -> None:
    """Where the mixture is the reference, first orders vanish."""
    s = scene(6, 15, history=40, seed=seed)
    earned = []
    for decay in (0.99, 0.999):
        mixed = s.moments.update(s.x, decay)
        perfect = Reference(mixed.mean, mixed.cov)
        first, _ = leave_one_out_fid(s.x, s.moments, perfect, decay, method="influence")
        assert np.abs(first).max() <= 1e-8 * (1 - decay) * np.trace(mixed.cov)
        rewards, _ = leave_one_out_fid(s.x, s.moments, perfect, decay)
        earned.append(np.abs(rewards).max())
    assert earned[1] <= 0.02 * earned[0]


@settings(deadline=None, max_examples=60)
@given(
    seed=seeds,
    decay=st.sampled_from([0.0, 1e-9, 0.5, 1 - 1e-6]),
    count=st.integers(2, 12),
    history=st.integers(1, 12),
    real=st.integers(1, 12),
    kind=st.sampled_from(["generic", "copies", "constant feature", "zero", "huge", "far outside"]),
)
@pytest.mark.parametrize("rewards", FORMS)
def test_always_finite(
    rewards: Rewards, seed: int, decay: float, count: int, history: int, real: int, kind: str
) -> None:
    s = scene(8, count, history, real, seed=seed)
    if kind == "copies":
        s = Scene(np.repeat(s.x[:1], count, 0), s.past, s.real)
    elif kind == "constant feature":
        for rows in (s.x, s.past, s.real):
            rows[:, 0] = 0.3
    elif kind == "zero":
        s = Scene(0 * s.x, 0 * s.past, s.real)
    elif kind == "huge":
        s = Scene(1e8 * s.x, s.past, s.real)
    elif kind == "far outside":
        s.x[0] += 1e6
    assert np.isfinite(rewards(s, decay)).all()
    _, fid = leave_one_out_fid(s.x, Moments.from_features(s.past), s.reference, decay)
    assert np.isfinite(fid)
    assert fid >= 0
