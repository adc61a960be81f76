"""Parts of the main loop that need no fleet."""

from __future__ import annotations

import numpy as np

from cluster.messages import Condition
from learner.loop import concatenate_features, spread


def names(conditions: int, count: int) -> list[int]:
    made = [Condition(text="", class_index=index) for index in range(conditions)]
    return [condition.class_index for condition in spread(made, count)]


def test_seed_images_go_round_the_conditions() -> None:
    assert names(3, 7) == [0, 1, 2, 0, 1, 2, 0]


def test_seed_images_of_many_conditions_are_spread_over_all() -> None:
    assert names(1000, 4) == [0, 250, 500, 750]
    assert names(10, 4) == [0, 2, 5, 7]
    assert len(set(names(1000, 999))) == 999


def test_a_group_without_any_scored_image_becomes_nan_rows() -> None:
    whole, none = np.ones((2, 3), np.float32), np.zeros((4, 0), np.float32)
    features = concatenate_features([none, whole])
    assert features.shape == (6, 3)
    assert np.isnan(features[:4]).all()
    assert (features[4:] == 1).all()
