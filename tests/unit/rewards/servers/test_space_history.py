from __future__ import annotations

import dataclasses
import math
from typing import Any

import msgpack
import numpy as np
import pytest
import threadpoolctl

from cluster.errors import CheckpointError, DataError
from cluster.io.checksum import verify_checksum
from rewards.distribution.config import MomentsConfig
from rewards.distribution.diagnostics import bias_constant
from rewards.distribution.diagonal import diagonal_distance
from rewards.distribution.history_basis import HistoryBasis
from rewards.distribution.leave_one_out import leave_one_out_fid
from rewards.distribution.moments import Moments
from rewards.distribution.reference import Reference, distance_to_reference
from rewards.servers.space_history import SpaceHistory


def features(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)


def make_server(*, seeded: bool = True, **settings: Any) -> SpaceHistory:
    server = SpaceHistory(MomentsConfig(**{"decay": 0.5, **settings}))
    server.set_reference(Reference.from_features(features(100, 0), "net"), "net")
    if seeded:
        server.seed(features(60, 1))
    return server


@pytest.fixture
def server() -> SpaceHistory:
    return make_server(decay=0.5)


ALL = np.ones(12, dtype=bool)
CLASSES = np.repeat([0, 1, 2], 4)


def test_commit_answers_the_leave_one_out_reward(server: SpaceHistory) -> None:
    x = features(12, 2)
    expected, fid = leave_one_out_fid(
        x,
        Moments.from_features(features(60, 1)),
        Reference.from_features(features(100, 0)),
        0.5,
    )
    answer = server.commit(0, x, ALL)
    np.testing.assert_allclose(answer.rewards, expected, rtol=1e-9)
    assert answer.fid == pytest.approx(fid)


def test_a_repeated_commit_counts_once(server: SpaceHistory) -> None:
    first = server.commit(0, features(12, 2), ALL)
    state = server.state()
    again = server.commit(0, features(12, 2), ALL)
    assert again is first
    assert server.state() == state
    server.commit(1, features(12, 3), ALL)
    assert server.state() != state


def test_commits_cannot_go_back(server: SpaceHistory) -> None:
    server.commit(3, features(12, 2), ALL)
    with pytest.raises(DataError, match="iteration 2 comes after 3 was committed"):
        server.commit(2, features(12, 2), ALL)


def test_failed_images_enter_neither_rewards_nor_moments(server: SpaceHistory) -> None:
    x, valid = features(12, 2), ALL.copy()
    valid[[3, 7]] = False
    broken = x.copy()
    broken[~valid] = np.nan
    answer = server.commit(0, broken, valid)
    assert np.isnan(answer.rewards[~valid]).all()
    other = SpaceHistory(MomentsConfig(decay=0.5))
    other.set_reference(Reference.from_features(features(100, 0)), "net")
    other.seed(features(60, 1))
    expected = other.commit(0, x[valid], ALL[:10])
    np.testing.assert_array_equal(answer.rewards[valid], expected.rewards)
    after = [each.commit(1, features(12, 3), ALL).rewards for each in (server, other)]
    np.testing.assert_array_equal(*after)


@pytest.mark.parametrize("kind", ["ema", "sliding"])
def test_restored_it_continues_as_if_nothing_had_happened(kind) -> None:
    server, restored = (make_server(kind=kind) for _ in range(2))
    first = server.commit(0, features(12, 2), ALL, run="a", classes=CLASSES)
    restored.restore(server.state())
    assert restored.state() == server.state()
    again = restored.commit(0, features(12, 2), ALL, run="a")  # the answer had been lost
    np.testing.assert_array_equal(again.rewards, first.rewards)
    assert dataclasses.replace(again, rewards=ALL, spans=()) == dataclasses.replace(
        first, rewards=ALL, spans=()
    )
    ours, theirs = (s.commit(1, features(12, 3), ALL, run="a") for s in (server, restored))
    np.testing.assert_array_equal(ours.rewards, theirs.rewards)
    assert ours.fid == theirs.fid


def test_another_run_may_go_on_from_a_checkpoint(server: SpaceHistory) -> None:
    server.commit(5, features(12, 2), ALL, run="a")
    forked = make_server(seeded=False)
    forked.restore(server.state())
    assert forked.commit(0, features(12, 3), ALL, run="b").iteration == 0
    with pytest.raises(DataError, match="belong to run 'b', but run 'a' commits"):
        forked.commit(6, features(12, 3), ALL, run="a")


def test_states_of_the_first_version_are_read(server: SpaceHistory) -> None:
    server.commit(3, features(12, 2), ALL)
    state = msgpack.unpackb(verify_checksum(server.state()), strict_map_key=False)
    old = msgpack.packb({"moments": state["moments"], "iteration": 3})
    restored = make_server(seeded=False)
    restored.restore(old)
    with pytest.raises(DataError, match="iteration 3 comes after 3 was committed"):
        restored.commit(3, features(12, 2), ALL)
    theirs = restored.commit(4, features(12, 3), ALL)
    np.testing.assert_array_equal(server.commit(4, features(12, 3), ALL).rewards, theirs.rewards)


def test_the_other_kind_of_history_is_refused(server: SpaceHistory) -> None:
    with pytest.raises(CheckpointError, match=r"of kind 'ema'.* asks for 'sliding': .* kind=ema"):
        make_server(kind="sliding").restore(server.state())


def test_a_repetition_is_the_same_batch(server: SpaceHistory) -> None:
    server.commit(0, features(12, 2), ALL)
    with pytest.raises(DataError, match="committed with 12 images, and comes again with 9"):
        server.commit(0, features(9, 2), ALL[:9])


def test_a_commit_that_failed_leaves_no_trace(server: SpaceHistory) -> None:
    before = server.state()
    with pytest.raises(DataError, match="at least 2 images"):
        server.commit(0, features(12, 2), ALL & (np.arange(12) == 3))
    with pytest.raises(DataError, match="classes must be 12 integers, one an image, found float64"):
        server.commit(0, features(12, 2), ALL, classes=np.zeros(12))
    assert server.state() == before
    assert server.commit(0, features(12, 2), ALL).iteration == 0


def test_a_window_is_a_decay(server: SpaceHistory) -> None:
    """12 images and decay .5 hold 36 effective images."""
    assert MomentsConfig(decay=0.5).effective_images(12, 4) == pytest.approx(36)
    windowed = make_server(window=36)
    for iteration in range(3):
        x = features(12, iteration + 2)
        ours, theirs = (s.commit(iteration, x, ALL) for s in (server, windowed))
        np.testing.assert_allclose(ours.rewards, theirs.rewards, rtol=1e-9)
    with pytest.raises(
        DataError, match=r"set window to at least the images of an iteration \(12\)"
    ):
        make_server(window=11).commit(0, features(12, 2), ALL)


def test_the_sliding_window_is_the_newest_images() -> None:
    server = make_server(kind="sliding", window=30)
    batches = [features(12, seed) for seed in range(2, 8)]
    for iteration, x in enumerate(batches):
        answer = server.commit(iteration, x, ALL)
    newest = Moments.from_features(np.concatenate(batches[-3:]))
    older = Moments.from_features(np.concatenate(batches[-3:-1]))
    reference = Reference.from_features(features(100, 0))
    assert answer.fid == pytest.approx(distance_to_reference(newest.mean, newest.cov, reference))
    assert answer.effective_size == 36
    expected, _ = leave_one_out_fid(batches[-1], older, reference, 2 / 3)
    np.testing.assert_allclose(answer.rewards, expected, rtol=1e-9)


@pytest.mark.parametrize("kind", ["ema", "sliding"])
def test_started_empty_the_first_batch_stands_alone(kind) -> None:
    server = make_server(kind=kind, seeded=False)
    assert math.isnan(server.seed(np.zeros((0, 4))))
    answer = server.commit(0, features(12, 2), ALL)
    assert answer.fid == pytest.approx(answer.batch_fid)
    assert answer.effective_size == pytest.approx(12)
    assert answer.gap == pytest.approx(0)
    expected, _ = leave_one_out_fid(
        features(12, 2),
        Moments.from_features(features(60, 1)),
        Reference.from_features(features(100, 0)),
        0.0,
    )
    np.testing.assert_allclose(answer.rewards, expected, rtol=1e-9)


def test_started_empty_the_average_fills_up_without_bias() -> None:
    """After two updates with decay .5: weights .25 and .5, so a third and two thirds."""
    server, reference = make_server(seeded=False), Reference.from_features(features(100, 0))
    server.seed(np.zeros((0, 4)))
    a, b = features(12, 2), features(12, 3)
    server.commit(0, a, ALL)
    answer = server.commit(1, b, ALL)
    expected, fid = leave_one_out_fid(b, Moments.from_features(a), reference, 1 / 3)
    np.testing.assert_allclose(answer.rewards, expected, rtol=1e-9)
    assert answer.fid == pytest.approx(fid)


def test_diagnostics(server: SpaceHistory) -> None:
    answer = server.commit(0, features(12, 2), ALL, classes=CLASSES)
    by_class = answer.rewards.reshape(3, 4)
    assert answer.class_rewards == pytest.approx(dict(enumerate(by_class.mean(1))))
    assert answer.between_classes == pytest.approx(by_class.mean(1).std())
    assert answer.within_classes == pytest.approx(np.sqrt(by_class.var(1).mean()))
    assert answer.positive_share == (answer.rewards > 0).mean()
    assert answer.gap == answer.batch_fid - answer.fid
    constant = bias_constant(Reference.from_features(features(100, 0)))
    assert answer.bias == pytest.approx(min(constant / answer.effective_size, answer.fid))
    assert answer.batch_bias == pytest.approx(min(constant / 12, answer.batch_fid))
    assert answer.lag == pytest.approx(
        answer.fid - answer.bias - answer.batch_fid + answer.batch_bias
    )
    captions = server.commit(1, features(12, 3), ALL, classes=np.full(12, -1))
    assert captions.class_rewards is None
    assert math.isnan(captions.between_classes)


@pytest.mark.parametrize("power", [0, 1])
def test_the_bias_estimate_is_what_few_images_do(power: int) -> None:
    """Twelve FIDs of the reference's own samples: 3 images a dimension, mean within 10 %."""
    dim, generator = 32, np.random.default_rng(0)
    spectrum = np.arange(1.0, dim + 1) ** -power
    reference = Reference(np.zeros(dim), np.diag(spectrum))
    sets = generator.normal(size=(12, 3 * dim, dim)) * np.sqrt(spectrum)
    moments = [Moments.from_features(x) for x in sets]
    measured = np.mean([distance_to_reference(m.mean, m.cov, reference) for m in moments])
    assert bias_constant(reference) / (3 * dim) == pytest.approx(measured, rel=0.1)
    diagonal = np.mean([diagonal_distance(m.mean, m.cov, reference) for m in moments])
    assert bias_constant(reference, "diagonal") / (3 * dim) == pytest.approx(diagonal, rel=0.1)


def test_the_bias_constant_by_hand() -> None:
    reference = Reference(np.zeros(5), np.eye(5))
    assert bias_constant(reference) == pytest.approx(5 + 5 * 6 / 4)
    sigma = np.array([[2.0, 1.0], [1.0, 2.0]])  # eigenvalues 1 and 3
    expected = 4 + 1 / 2 + 3 / 2 + 3 / 4
    assert bias_constant(Reference(np.zeros(2), sigma)) == pytest.approx(expected)


def test_a_short_window_is_reported_once() -> None:
    """4 dimensions need 8 effective images; 5 images with decay .1 hold 6."""
    settings = {"decay": 0.1}
    server = make_server(**settings)
    (warning,) = server.commit(0, features(5, 2), ALL[:5]).warnings
    assert "about 6 images for a full covariance of 4 dimensions: below 8" in warning
    assert "Set a window of 8 or more" in warning
    assert "covariance=diagonal" in warning
    assert server.commit(1, features(5, 3), ALL[:5]).warnings == ()
    assert make_server().commit(0, features(12, 2), ALL).warnings == ()
    diagonal = make_server(covariance="diagonal", **settings)
    assert diagonal.commit(0, features(5, 2), ALL[:5]).warnings == ()


@pytest.mark.parametrize("mode", ["ema_loo", "loo_batch"])
def test_the_diagonal_form(mode) -> None:
    server = make_server(covariance="diagonal", mode=mode)
    x, history = features(12, 2), Moments.from_features(features(60, 1))
    reference = Reference.from_features(features(100, 0))
    answer = server.commit(0, x, ALL)
    expected, _ = leave_one_out_fid(x, history, reference, 0.5, covariance="diagonal", mode=mode)
    np.testing.assert_allclose(answer.rewards, expected)
    after = history.update(x, 0.5)
    spread = np.sqrt(np.diag(after.cov)) - np.sqrt(np.diag(reference.sigma))
    by_hand = ((after.mean - reference.mu) ** 2).sum() + (spread**2).sum()
    assert answer.fid == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 1.0}, r"decay must be in \[0, 1\), found 1.0"),
        ({"num_threads": 0}, "num_threads must be >= 1, found 0"),
        ({"window": -1.0}, "window must be a number of images, or 0 for decay; found -1"),
        ({"mode": "loo_batch"}, "mode 'loo_batch' needs covariance=diagonal"),
        ({"covariance": "diagonal", "method": "influence"}, "needs covariance=full"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MomentsConfig(**settings)


def test_there_is_no_state_before_the_seed() -> None:
    with pytest.raises(DataError, match="has no moments yet"):
        SpaceHistory(MomentsConfig()).state()
    with pytest.raises(DataError, match="needs a reference first"):
        SpaceHistory(MomentsConfig()).seed(features(9, 1))


def test_another_feature_network_is_refused() -> None:
    server = SpaceHistory(MomentsConfig())
    with pytest.raises(DataError, match="made with features 'a', but the reward servers use 'b'"):
        server.set_reference(Reference.from_features(features(9, 0), "a"), "b")


def test_it_needs_reference_and_seed() -> None:
    with pytest.raises(DataError, match="needs a reference and seeded moments first"):
        SpaceHistory(MomentsConfig()).commit(0, features(12, 2), ALL)


def test_other_state_is_refused(server: SpaceHistory) -> None:
    with pytest.raises(CheckpointError, match="no state of a moments server"):
        server.restore(b"\x01")


def test_the_default_window_follows_images_and_dimensions() -> None:
    config = MomentsConfig()
    assert config.effective_images(128, 2048) == 5 * 2048
    assert config.decay_at(128, 2048) == pytest.approx((10240 - 128) / (10240 + 128))
    assert config.effective_images(128, 4) == 128  # never less than an iteration
    assert config.decay_at(128, 4) == 0
    assert MomentsConfig(covariance="diagonal").effective_images(128, 2048) == 1000


WIDE = 64
BATCHES = [np.random.default_rng(seed).normal(size=(20, WIDE)) for seed in range(20, 36)]


def wide_server(seed: bool = True, **settings: Any) -> SpaceHistory:
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(WIDE, WIDE)) / 8
    server = SpaceHistory(MomentsConfig(**({"decay": 0.9} | settings)))
    reference = Reference.from_features(generator.normal(size=(400, WIDE)) @ mixing, "net")
    server.set_reference(reference, "net")
    if seed:
        server.seed(generator.normal(size=(300, WIDE)))
    return server


def commit_wide(
    server: SpaceHistory, iteration: int, count: int = 5, *, refresh: bool = True
) -> np.ndarray:
    if refresh:  # as the loop does it, after the seed and after every commit
        server.refresh()
    x = BATCHES[iteration][:count]
    return server.commit(iteration, x, np.ones(count, bool)).rewards


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each commit that an old decomposition served: batches since it was made."""
    found: list[int] = []
    original = HistoryBasis.leave_one_out

    def counting(self: HistoryBasis, pending: Any, x: np.ndarray, decay: float) -> Any:
        found.append(len(pending))
        return original(self, pending, x, decay)

    monkeypatch.setattr(HistoryBasis, "leave_one_out", counting)
    return found


@pytest.mark.parametrize(
    "count", [3, 4, 16, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 5, 8))]
)
def test_an_old_decomposition_serves_every_commit_exactly(count: int, used: list[int]) -> None:
    """A quarter of the dimensions is 16 images. 4 of them are the presets' 128 of 2,048 dimensions,
    8 their 256."""
    plain, reusing = wide_server(), wide_server()
    for iteration in range(16):
        expected = commit_wide(plain, iteration, count, refresh=False)
        found = commit_wide(reusing, iteration, count)
        assert np.abs(found - expected).max() <= 1e-6 * expected.std()
    assert used == [iteration % (16 // count) for iteration in range(16)]


def test_batches_of_more_images_are_judged_by_themselves(
    used: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    original = HistoryBasis.of
    monkeypatch.setattr(HistoryBasis, "of", lambda *options: made.append(1) or original(*options))
    plain, reusing = wide_server(), wide_server()
    for iteration in range(4):
        expected = commit_wide(plain, iteration, 17, refresh=False)
        assert np.array_equal(commit_wide(reusing, iteration, 17), expected)
    assert used == []
    assert len(made) == 1  # after the seed, when nobody knows how many will come


def test_a_history_short_of_full_rank_is_not_decomposed_after_every_commit(
    used: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    original = HistoryBasis.of
    monkeypatch.setattr(HistoryBasis, "of", lambda *options: made.append(1) or original(*options))
    plain, reusing = wide_server(seed=False), wide_server(seed=False)
    for server in (plain, reusing):
        server.seed(np.random.default_rng(1).normal(size=(40, WIDE)))
    for iteration in range(16):
        expected = commit_wide(plain, iteration, 4, refresh=False)
        found = commit_wide(reusing, iteration, 4)
        assert np.abs(found - expected).max() <= 1e-6 * expected.std()
    assert len(made) == 3  # at the start; after 8 commits, with 72 images; then as is due
    assert used == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("threads", [1, 2])
def test_the_threads_of_its_algebra(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = HistoryBasis.of

    def counting(*options: Any) -> HistoryBasis:
        pools = threadpoolctl.threadpool_info()
        seen.append(max(pool["num_threads"] for pool in pools if pool["user_api"] == "blas"))
        return original(*options)

    monkeypatch.setattr(HistoryBasis, "of", counting)
    commit_wide(wide_server(num_threads=threads), 0)
    assert seen == [threads]


def test_a_batch_of_another_weight_starts_anew() -> None:
    server = SpaceHistory(MomentsConfig(window=400))
    plain = SpaceHistory(MomentsConfig(window=400))
    for each in (server, plain):
        each.set_reference(
            Reference.from_features(np.random.default_rng(0).normal(size=(400, WIDE))), ""
        )
        each.seed(np.random.default_rng(1).normal(size=(300, WIDE)))
    for iteration, count in enumerate([5, 5, 4, 4, 5, 5, 5]):  # as when images fail
        expected = commit_wide(plain, iteration, count, refresh=False)
        found = commit_wide(server, iteration, count)
        assert np.abs(found - expected).max() <= 1e-6 * expected.std()


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_a_restored_server_continues_bit_for_bit(after: int) -> None:
    server = wide_server()
    for iteration in range(after):
        commit_wide(server, iteration)
    server.refresh()
    restored = wide_server(seed=False)
    restored.restore(server.state())
    for iteration in range(after, 6):
        assert np.array_equal(commit_wide(restored, iteration), commit_wide(server, iteration))
    assert restored.state() == server.state()


def test_a_decomposition_serves_no_other_reward() -> None:
    """A run that goes on with another covariance forgets it."""
    server = wide_server()
    commit_wide(server, 0)
    other = wide_server(seed=False, covariance="diagonal")
    other.restore(server.state())
    fresh = wide_server(seed=False, covariance="diagonal")
    fresh._history = server._history
    assert np.array_equal(commit_wide(other, 1), commit_wide(fresh, 1))


def test_refreshing_twice_changes_nothing() -> None:
    server = wide_server()
    commit_wide(server, 0)
    server.refresh()
    state = server.state()
    server.refresh()
    assert server.state() == state


def test_a_lag_that_stays_is_reported_once() -> None:
    """The policy jumps to the reference; the history remembers what it was."""
    server = make_server(decay=0.99, seeded=False)
    server.seed(features(400, 1) * 9)
    told = [server.commit(i, features(40, 100 + i), np.ones(40, bool)).warnings for i in range(25)]
    assert [i for i, warnings in enumerate(told) if warnings] == [9]
    assert "the history lags behind the policy: for 10 iterations" in told[9][0]
    assert "shorten the window" in told[9][0]
    again = [
        server.commit(i, features(40, i) * s, np.ones(40, bool)).warnings
        for i, s in enumerate([9.0] * 30 + [1.0] * 30, 25)
    ]
    assert not any(again)  # not when it lags a second time, either


@pytest.mark.parametrize("kind", ["ema", "sliding"])
@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_a_reference_of_another_dimension_is_refused(kind: Any, covariance: Any) -> None:
    """Wherever features and reference meet: seeded, committed, restored, or set anew."""
    settings = {"kind": kind, "covariance": covariance, "window": 100}
    wider = Reference(np.zeros(7), np.eye(7), source="stats.npz")  # of another tool: no fingerprint
    message = r"stats.npz: expected moments of 4 dimensions, as the features of net have, found 7"
    server = SpaceHistory(MomentsConfig(**settings))
    server.set_reference(wider, "net")
    with pytest.raises(DataError, match=message):
        server.seed(features(60, 1))
    server.seed(np.zeros((0, 4), np.float32))  # empty: nothing to compare yet
    with pytest.raises(DataError, match=message):
        server.commit(0, features(12, 2), ALL)
    good = make_server(**settings)
    good.commit(0, features(12, 2), ALL)
    with pytest.raises(DataError, match=message):
        server.restore(good.state())
    with pytest.raises(DataError, match=message):
        good.set_reference(wider, "net")
    good.commit(1, features(12, 3), ALL)  # and nothing has changed by it


def test_an_iteration_without_valid_images_is_reported_as_such(server: SpaceHistory) -> None:
    with pytest.raises(DataError) as caught:
        server.commit(0, np.zeros((12, 0), np.float32), ~ALL)
    assert "dimensions, as the features" not in str(caught.value)
