"""The fast exact forms against the definition, one image at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from cluster.errors import DataError
from rewards.distribution import leave_one_out
from rewards.distribution.history_basis import HistoryBasis
from rewards.distribution.leave_one_out import leave_one_out_fid
from rewards.distribution.moments import Moments
from rewards.distribution.reference import Reference
from tests.unit.leave_one_out_oracle import Oracle, Scene, scene

TARGET = 1e-6  # of the rewards' standard deviation


def error(s: Scene, decay: float, some: int | None = None) -> float:
    """Largest error of the exact rewards over their standard deviation."""
    rewards, _ = leave_one_out_fid(s.x, s.moments, s.reference, decay)
    images = range(min(some or len(rewards), len(rewards)))
    expected = Oracle(s, decay).rewards(images)
    return np.abs(rewards[: len(images)] - expected).max() / rewards.std()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.999])
@pytest.mark.parametrize(("dim", "count"), [(8, 16), (64, 160), (64, 24), (64, 65), (16, 2)])
def test_equals_the_definition(dim: int, count: int, decay: float) -> None:
    s = scene(dim, count, history=5 * dim)
    assert error(s, decay, some=8 if count > 24 else None) <= TARGET
    _, fid = leave_one_out_fid(s.x, s.moments, s.reference, decay)
    assert fid == pytest.approx(Oracle(s, decay).fid(s.x), rel=1e-9)


@pytest.mark.parametrize("condition", [1e2, pytest.param(1e8, marks=pytest.mark.slow), 1e14])
@pytest.mark.parametrize("alike", [True, False])
def test_singular_and_steep_covariances(condition: float, alike: bool) -> None:
    """Any of history, batch, mixture and reference may be short of full rank, by one or by far."""
    dim = 32
    for history, real, (count, weight) in itertools.product(
        [10, 31, 33, 300],
        [20, 300],
        [(2, 0.5), (16, 1), (16, 0.5), (16, 1e-3), (33, 1), (34, 1), (64, 0.1)],
    ):
        s = scene(dim, count, history, real, condition, alike=alike)
        worst = error(s, 1 - weight, some=2)
        assert worst <= TARGET, f"{history=} {real=} {count=} {weight=}: {worst:.1e}"


@pytest.mark.parametrize(
    ("history", "real"), [(10, 300), (31, 20), (33, 300), (300, 20), (300, 300)]
)
@pytest.mark.parametrize("condition", [1e2, 1e14])
def test_the_routines_for_large_covariances(
    history: int, real: int, condition: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are as exact as the others on small ones, which may be short of rank."""
    calls = large_calls(monkeypatch)
    monkeypatch.setattr(leave_one_out, "LARGE", 2)
    for count, weight in [(2, 0.5), (16, 0.5), (16, 1e-3), (33, 1), (64, 1), (64, 0.1)]:
        s = scene(32, count, history, real, condition, alike=False)
        assert error(s, 1 - weight, some=2) <= TARGET, f"{count=} {weight=}"
    assert len(calls) >= 5


@pytest.mark.parametrize("real", [None, 520])
def test_large_covariances_have_the_same_rewards(
    real: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = scene(540, 24, 1400, real, condition=1e4, alike=False)
    moments, reference = s.moments, s.reference
    calls = large_calls(monkeypatch)
    fast, fid = leave_one_out_fid(s.x, moments, reference, 0.99)
    assert len(calls) == 1
    monkeypatch.setattr(leave_one_out, "LARGE", 1000)
    plain, same = leave_one_out_fid(s.x, moments, reference, 0.99)
    assert len(calls) == 1
    np.testing.assert_allclose(fast, plain, rtol=0, atol=1e-9 * plain.std())
    assert fid == pytest.approx(same, rel=1e-11)


def large_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ranks of the problems that `_decompose_large` takes from now on."""
    calls, original = list[int](), leave_one_out._decompose_large

    def noted(problem: leave_one_out._Problem) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(problem.factor.shape[1])
        return original(problem)

    monkeypatch.setattr(leave_one_out, "_decompose_large", noted)
    return calls


def test_the_two_routes_agree_where_both_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    s = scene(48, 40, history=200, condition=1e3)
    for decay in (0.0, 0.5, 0.999):
        fast, fid = leave_one_out_fid(s.x, s.moments, s.reference, decay)
        with monkeypatch.context() as patch:
            patch.setattr(leave_one_out, "BUDGET", -1.0)
            slow, same = leave_one_out_fid(s.x, s.moments, s.reference, decay)
        assert not np.array_equal(fast, slow) or decay == 0
        np.testing.assert_allclose(fast, slow, atol=1e-9 * slow.std())
        assert fid == pytest.approx(same, rel=1e-11)


def test_an_image_that_spans_a_direction_of_its_own_is_not_squared_away() -> None:
    """Its leverage is 1 - 1e-10: a square would keep five digits of what is left without it."""
    s = scene(16, 40, history=200)
    axis = np.eye(16)[0]
    flat = Scene(s.x - np.outer(s.x @ axis, axis), s.past * (1 - (1 - 1e-6) * axis), s.real)
    flat.x[0] += axis
    for decay in (0.5, 0.99):
        assert error(flat, decay) <= TARGET


@pytest.mark.parametrize("weight", [1e-3, 0.0125, 0.5, 1.0])
def test_a_basis_of_an_old_history_gives_the_same_rewards(weight: float) -> None:
    s = scene(96, 24, history=400, condition=1e3)
    batches, decay = np.split(s.x, 3), 1 - weight
    basis, moments = HistoryBasis.of(s.moments, s.reference), s.moments
    for index, batch in enumerate(batches):
        pending = batches[:index]
        expected, fid = leave_one_out_fid(batch, moments, s.reference, decay)
        if not decay:
            assert not basis.fits(pending, batch, decay)
            with pytest.raises(ValueError, match="does not fit"):
                basis.leave_one_out(pending, batch, decay)
            continue
        assert basis.fits(pending, batch, decay)
        rewards, same = basis.leave_one_out(pending, batch, decay)
        assert np.abs(rewards - expected).max() <= 1e-8 * expected.std()
        assert same == pytest.approx(fid, rel=1e-9)
        moments = moments.update(batch, decay)


def test_what_a_basis_refuses() -> None:
    s = scene(48, 8, history=200)
    assert HistoryBasis.of(s.moments, s.reference).fits([], s.x, 0.9)
    assert not HistoryBasis.of(s.moments, s.reference).fits([s.x], s.x, 0.9)  # too many
    short = Moments.from_features(s.past[:40])
    assert not HistoryBasis.of(short, s.reference).fits([], s.x, 0.9)
    steep = scene(48, 8, history=200, condition=1e8)
    assert not HistoryBasis.of(steep.moments, steep.reference).fits([], s.x, 0.9)


def test_a_basis_works_where_the_reference_is_short_of_rank() -> None:
    s = scene(96, 12, history=400, real=60)
    rewards, _ = HistoryBasis.of(s.moments, s.reference).leave_one_out([], s.x, 0.9)
    expected = Oracle(s, 0.9).rewards()
    assert np.abs(rewards - expected).max() <= TARGET * expected.std()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_influence_is_the_first_order_of_the_exact_form(decay: float) -> None:
    """The difference falls with the square of an image's weight."""
    gaps = []
    for count in (200, 800):
        s = scene(8, count, history=400)
        exact, fid = leave_one_out_fid(s.x, s.moments, s.reference, decay)
        first, same = leave_one_out_fid(s.x, s.moments, s.reference, decay, method="influence")
        assert same == pytest.approx(fid, rel=1e-9)
        assert abs(first.sum()) <= 1e-12 * np.abs(first).sum()
        gaps.append(np.abs(first - exact)[:200].mean() / exact.std())
    assert gaps[1] < 0.4 * gaps[0] < 0.1


def test_influence_by_hand() -> None:
    """One dimension, decay 0: F = (m - mu)^2 + (sd - sd_r)^2, with its derivative."""
    x = np.array([[0.0], [1.0], [5.0]])
    rewards, fid = leave_one_out_fid(
        x, Moments.from_features(x), Reference(np.array([1.0]), np.array([[4.0]])), 0.0,
        method="influence",
    )  # fmt: skip
    sd = x.std()
    assert fid == pytest.approx(1 + (sd - 2) ** 2)
    q = (x[:, 0] - 1) ** 2 - (x[:, 0] - 2) ** 2 * 2 / sd
    np.testing.assert_allclose(rewards, (q.mean() - q) / 2)


def diagonal_definition(s: Scene, decay: float, mode: str) -> tuple[np.ndarray, float]:
    """2603.23086's code restated: raw moments of single features, one missing image at a time."""
    mu, deviation = s.real.mean(0), np.sqrt(s.real.var(0))

    def moments(x: np.ndarray) -> np.ndarray:
        return np.array([x.mean(0), (x**2).mean(0)])

    def distance(m: np.ndarray) -> float:
        spread = np.sqrt(np.maximum(m[1] - m[0] ** 2, 0) + 1e-12)
        return float(((mu - m[0]) ** 2).sum() + ((deviation - spread) ** 2).sum())

    def after(x: np.ndarray) -> float:
        b = 0.0 if mode == "loo_batch" else decay
        return distance(b * moments(s.past) + (1 - b) * moments(x))

    whole = after(s.x)
    if mode == "ema_scalar":
        return np.full(len(s.x), distance(moments(s.past)) - whole), whole
    return np.array([after(np.delete(s.x, i, 0)) for i in range(len(s.x))]) - whole, whole


@pytest.mark.parametrize("mode", ["ema_loo", "loo_batch", "ema_scalar"])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_the_diagonal_form_is_the_public_codes(mode, decay: float) -> None:
    s = scene(24, 40, history=100)
    s.x[:, 0] = 0.25  # a feature that does not vary
    rewards, fid = leave_one_out_fid(
        s.x, s.moments, s.reference, decay, covariance="diagonal", mode=mode
    )
    expected, whole = diagonal_definition(s, decay, mode)
    np.testing.assert_allclose(rewards, expected, rtol=0, atol=1e-10)
    assert fid == pytest.approx(whole, rel=1e-10)


def test_full_and_diagonal_agree_on_uncorrelated_features() -> None:
    """Where no two features vary together, in the batch without any one image, too."""
    x = np.concatenate([np.diag([1.0, 2, 3]), -np.diag([1.0, 2, 3])])
    s = Scene(x, 1.2 * x, 0.8 * x)
    full, fid = leave_one_out_fid(s.x, s.moments, s.reference, 0.99)
    diagonal, same = leave_one_out_fid(s.x, s.moments, s.reference, 0.99, covariance="diagonal")
    assert fid == pytest.approx(same, rel=1e-9)
    assert np.corrcoef(full, diagonal)[0, 1] > 0.99


def test_the_arguments_are_not_changed() -> None:
    s = scene(8, 16, history=40)
    moments, x = s.moments, s.x.copy()
    before = moments.to_bytes()
    for options in ({}, {"method": "influence"}, {"covariance": "diagonal"}):
        leave_one_out_fid(s.x, moments, s.reference, 0.5, **options)
    assert moments.to_bytes() == before
    assert np.array_equal(s.x, x)


def test_bad_input_is_refused() -> None:
    s = scene(6, 15, history=40)
    arguments = s.moments, s.reference
    with pytest.raises(DataError, match="at least 2 images, found 1"):
        leave_one_out_fid(s.x[:1], *arguments, 0.5)
    with pytest.raises(DataError, match="features have 5 dimensions, moments 6"):
        leave_one_out_fid(s.x[:, :5], *arguments, 0.5)
    with pytest.raises(ValueError, match="decay must be in"):
        leave_one_out_fid(s.x, *arguments, 1.0)
    with pytest.raises(ValueError, match="needs covariance 'diagonal'"):
        leave_one_out_fid(s.x, *arguments, 0.5, mode="loo_batch")
    with pytest.raises(ValueError, match="needs covariance 'full'"):
        leave_one_out_fid(s.x, *arguments, 0.5, covariance="diagonal", method="influence")
    with pytest.raises(ValueError, match="unknown covariance or method"):
        leave_one_out_fid(s.x, *arguments, 0.5, method="guess")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode must be one of"):
        leave_one_out_fid(s.x, *arguments, 0.5, covariance="diagonal", mode="x")  # type: ignore


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("dim", "history", "real", "condition", "weight"),
    [
        (256, 800, 1536, 1e14, 0.001),
        (768, 2304, 2304, 1e4, 0.001),
        (768, 2304, 2304, 1e8, 0.5),
        (768, 2304, 2304, 1e14, 0.0125),
        (768, 500, 2304, 1e4, 0.0125),
        (768, 2304, 600, 1e4, 1.0),
        (2048, 6144, 6144, 1e6, 0.0125),
        (2048, 1000, 6144, 1e4, 0.5),
        (2048, 6144, 6144, 1e4, 1.0),
    ],
)
def test_at_the_size_of_real_features(
    dim: int, history: int, real: int, condition: float, weight: float
) -> None:
    s = scene(dim, 128, history, real, condition)
    worst = error(s, 1 - weight, some=2 if dim > 1000 else 4)
    print(f"D={dim} {history=} {real=} {condition=:.0e} {weight=}: {worst:.1e}")
    assert worst <= TARGET


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 540])
def test_the_gpu_agrees(dim: int) -> None:
    s = scene(dim, 100, history=5 * dim, condition=1e6)
    basis = HistoryBasis.of(s.moments, s.reference, "cuda")
    for decay in (0.5, 0.99):
        here, _ = leave_one_out_fid(s.x, s.moments, s.reference, decay)
        there, _ = leave_one_out_fid(s.x, s.moments, s.reference, decay, device="cuda")
        assert np.abs(here - there).max() <= TARGET * here.std()
        here, _ = leave_one_out_fid(s.x[:16], s.moments, s.reference, decay)
        there, _ = basis.leave_one_out([], s.x[:16], decay)
        assert np.abs(here - there).max() <= TARGET * here.std()
    assert torch.cuda.is_available()
