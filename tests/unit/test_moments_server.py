from __future__ import annotations

import numpy as np
import pytest

from cluster.errors import CheckpointError, DataError
from rewards.fid import Reference
from rewards.leave_one_out import leave_one_out_fid
from rewards.moments import Moments
from rewards.moments_server import MomentsConfig, MomentsServer


def features(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)


@pytest.fixture
def server() -> MomentsServer:
    server = MomentsServer(MomentsConfig(decay=0.5))
    server.set_reference(Reference.from_features(features(100, 0), "net"), "net")
    server.seed(features(60, 1))
    return server


ALL = np.ones(12, dtype=bool)


def test_commit_answers_the_leave_one_out_reward(server: MomentsServer) -> None:
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


def test_a_repeated_commit_counts_once(server: MomentsServer) -> None:
    first = server.commit(0, features(12, 2), ALL)
    state = server.state()
    again = server.commit(0, features(12, 2), ALL)
    assert again is first
    assert server.state() == state
    server.commit(1, features(12, 3), ALL)
    assert server.state() != state


def test_commits_cannot_go_back(server: MomentsServer) -> None:
    server.commit(3, features(12, 2), ALL)
    with pytest.raises(DataError, match="iteration 2 comes after 3 was committed"):
        server.commit(2, features(12, 2), ALL)


def test_failed_images_enter_neither_rewards_nor_moments(server: MomentsServer) -> None:
    x, valid = features(12, 2), ALL.copy()
    valid[[3, 7]] = False
    broken = x.copy()
    broken[~valid] = np.nan
    answer = server.commit(0, broken, valid)
    assert np.isnan(answer.rewards[~valid]).all()
    other = MomentsServer(MomentsConfig(decay=0.5))
    other.set_reference(Reference.from_features(features(100, 0)), "net")
    other.seed(features(60, 1))
    expected = other.commit(0, x[valid], ALL[:10])
    np.testing.assert_array_equal(answer.rewards[valid], expected.rewards)
    assert server.state() == other.state()


def test_restored_it_goes_on_as_if_nothing_had_happened(server: MomentsServer) -> None:
    server.commit(0, features(12, 2), ALL)
    restored = MomentsServer(MomentsConfig(decay=0.5))
    restored.set_reference(Reference.from_features(features(100, 0)), "net")
    restored.restore(server.state())
    with pytest.raises(DataError, match="iteration 0 comes after 0"):
        restored.commit(0, features(12, 2), ALL)
    ours, theirs = (s.commit(1, features(12, 3), ALL) for s in (server, restored))
    np.testing.assert_array_equal(ours.rewards, theirs.rewards)


def test_another_feature_network_is_refused() -> None:
    server = MomentsServer(MomentsConfig())
    with pytest.raises(DataError, match="made with features 'a', but the reward servers use 'b'"):
        server.set_reference(Reference.from_features(features(9, 0), "a"), "b")


def test_it_needs_reference_and_seed() -> None:
    with pytest.raises(DataError, match="needs a reference and seeded moments first"):
        MomentsServer(MomentsConfig()).commit(0, features(12, 2), ALL)


def test_foreign_state_is_refused(server: MomentsServer) -> None:
    with pytest.raises(CheckpointError, match="no state of a moments server"):
        server.restore(b"\x01")
