from __future__ import annotations

import numpy as np
import pytest

from cluster.errors import CheckpointError
from learner.grpo.advantage import group_advantages
from learner.training.batch import make_batch
from rewards.combine import EPSILON, Combiner, RewardTerm, normalise_scores, spread_within
from tests.unit.helpers import scored_group

ALL = np.ones((2, 3), dtype=bool)
SCORES = np.array([[1.0, 2.0, 3.0], [10.0, 10.0, 40.0]])


def test_group_normalisation_by_hand() -> None:
    z = normalise_scores(SCORES, ALL, "group")
    for row, values in zip(z, SCORES):
        np.testing.assert_allclose(row, (values - values.mean()) / (values.std() + EPSILON))


def test_batch_normalisation_keeps_the_groups_relative_weight() -> None:
    z = normalise_scores(SCORES, ALL, "batch")
    centred = SCORES - SCORES.mean(1, keepdims=True)
    np.testing.assert_allclose(z, centred / SCORES.std())
    assert np.abs(z[1]).max() > 5 * np.abs(z[0]).max()


@pytest.mark.parametrize("how", ["group", "batch"])
def test_failed_images_count_nowhere(how: str) -> None:
    valid = np.array([[True, True, True, False]])
    with_failed = normalise_scores(np.array([[1.0, 2.0, 3.0, np.nan]]), valid, how)
    without = normalise_scores(np.array([[1.0, 2.0, 3.0]]), np.ones((1, 3), bool), how)
    np.testing.assert_allclose(with_failed[:, :3], without)
    assert with_failed[0, 3] == 0


@pytest.mark.parametrize("how", ["group", "batch"])
def test_a_group_without_differences_gets_zeros(how: str) -> None:
    z = normalise_scores(np.full((2, 3), 0.1), ALL, how)
    np.testing.assert_allclose(z, 0, atol=1e-12)


def test_a_group_that_failed_whole_gets_zeros() -> None:
    z = normalise_scores(np.full((1, 3), np.nan), np.zeros((1, 3), bool), "group")
    assert z.tolist() == [[0, 0, 0]]


def test_rewards_are_normalised_apart_then_weighted() -> None:
    groups = [
        scored_group({"clip": [0.1, 0.2, 0.3], "hps": [5.0, 5.0, 2.0]}, group=0),
        scored_group({"clip": [0.0, 0.4, 0.2], "hps": [1.0, 2.0, 3.0]}, group=1),
    ]
    loo = np.array([[1e-3, 2e-3, -1e-3], [0.0, 1e-3, 5e-3]])
    terms = {
        "clip": RewardTerm(weight=1.0),
        "hps": RewardTerm(weight=0.0),
        "loo_fid": RewardTerm(weight=4.0, normalise="batch"),
    }
    found = group_advantages(groups, {"loo_fid": loo}, Combiner(terms))
    clip = np.array([[0.1, 0.2, 0.3], [0.0, 0.4, 0.2]], np.float32)
    expected = normalise_scores(clip, ALL, "group") + 4 * normalise_scores(loo, ALL, "batch")
    np.testing.assert_allclose(found.values, expected, rtol=1e-6)
    np.testing.assert_allclose(found.values.sum(1), 0, atol=1e-5)
    assert set(found.rewards) == {"clip", "hps", "loo_fid"}
    assert found.flat_groups == 0


def test_flat_groups_are_counted() -> None:
    groups = [scored_group({"clip": [0.5, 0.5, 0.5]}), scored_group({"clip": [0.1, 0.2, 0.3]})]
    assert group_advantages(groups, {}, Combiner({"clip": RewardTerm()})).flat_groups == 1


def test_failed_images_leave_the_training_batch() -> None:
    groups = [
        scored_group({"clip": [0.1, np.nan, 0.3]}, group=0, errors=[None, "clip: boom", None]),
        scored_group({"clip": [0.0, 0.4, 0.2]}, group=1, version=4),
    ]
    advantages = group_advantages(groups, {}, Combiner({"clip": RewardTerm()}))
    batch = make_batch(7, groups, advantages)
    assert batch.iteration == 7
    assert batch.tokens.shape == (5, 4)
    assert [condition.class_index for condition in batch.conditions] == [0, 0, 1, 1, 1]
    assert batch.versions.tolist() == [0, 0, 4, 4, 4]
    np.testing.assert_array_equal(batch.tokens[:2], groups[0].rollouts.tokens[[0, 2]])
    np.testing.assert_array_equal(batch.advantages, advantages.values[advantages.valid])
    assert len(batch.specs) == 1


def test_anchored_by_hand() -> None:
    z = normalise_scores(SCORES, ALL, "anchored", anchor=5.0)
    np.testing.assert_allclose(z, (SCORES - SCORES.mean(1, keepdims=True)) / 5)
    assert normalise_scores(SCORES, ALL, "anchored", anchor=0.0).tolist() == [[0] * 3] * 2


def test_centred_by_hand() -> None:
    z = normalise_scores(SCORES, ALL, "centred")
    np.testing.assert_allclose(z, [[-1, 0, 1], [-10, -10, 20]])


def test_spread_within_groups_by_hand() -> None:
    """Deviations -1 0 1 and -10 -10 20: sqrt((2 + 600) / 6). A failed image does not count."""
    assert spread_within(SCORES, ALL) == pytest.approx((602 / 6) ** 0.5)
    padded = np.concatenate([SCORES, [[np.nan], [7.0]]], 1)
    valid = np.concatenate([ALL, [[False], [False]]], 1)
    assert spread_within(padded, valid) == spread_within(SCORES, ALL)
    assert spread_within(SCORES, ~ALL) == 0


def test_anchors_are_those_of_the_first_batch_and_survive_a_checkpoint() -> None:
    terms = {"clip": RewardTerm(normalise="anchored", weight=2.0)}
    combiner = Combiner(terms)
    combiner({"clip": SCORES}, ALL)
    resumed = Combiner(terms)
    resumed.restore(combiner.state())
    for each in (combiner, resumed):
        later = each({"clip": SCORES / 10}, ALL)
        centred = SCORES - SCORES.mean(1, keepdims=True)
        np.testing.assert_allclose(
            later.values, 2 * centred / 10 / spread_within(SCORES, ALL), atol=1e-12
        )
    assert Combiner(terms).anchors is None
    with pytest.raises(CheckpointError, match="anchors cannot be read"):
        Combiner(terms).restore(b"\x81")


def test_a_limit_clips_the_normalised_reward_before_its_weight() -> None:
    scores = np.array([[0.0, 0.0, 0.0, 4.0]])
    z = normalise_scores(scores, np.ones((1, 4), bool), "group")
    term = RewardTerm(weight=3.0, limit=1.0)
    found = Combiner({"clip": term})({"clip": scores}, np.ones((1, 4), bool))
    np.testing.assert_allclose(found.normalised["clip"], np.minimum(z, 1.0))
    np.testing.assert_allclose(found.values, 3 * np.minimum(z, 1.0))
    assert found.clipped == {"clip": 0.25}
    with pytest.raises(ValueError, match="limit must be >= 0"):
        RewardTerm(limit=-1.0)
