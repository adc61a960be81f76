"""Parts of the main loop that need no fleet, and what is kept of many images."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from cluster.errors import DataError
from cluster.messages import (
    MAIN_SPACE,
    Condition,
    GroupScores,
    RolloutGroup,
    SampleRequest,
    ScoredGroup,
)
from learner.evaluation.held_out import evaluate_policy
from learner.loop import concatenate_features, prepare, spread
from learner.rollouts.feature_space import RewardSpace
from learner.rollouts.prefetch import requests_for
from rewards.metrics.samples import RealImages
from tests.small_run import small_config


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


class Drawing:
    """The part of a fleet that seed images and evaluations need. It says how many groups' rollouts
    were alive at once; features tell which image they are of."""

    def __init__(self) -> None:
        self.learner = self.moments = self
        self.alive = weakref.WeakSet[Any]()
        self.most, self.asked, self.seeded = 0, 0, np.zeros((0, 2))
        self.sizes = set[int]()

    def stream(self, requests: Iterable[SampleRequest]) -> Iterator[ScoredGroup]:
        generator = np.random.default_rng(0)
        for request in requests:
            size = request.num_rollouts
            self.sizes.add(request.image_size)
            numbers = generator.random((size, 3), np.float32)
            kept = Rollouts(
                request=request, version=0, tokens=numbers, logprobs=numbers, entropies=numbers
            )
            self.alive.add(kept)
            features = {MAIN_SPACE: numbers[:, :2]}
            scores = GroupScores(
                key=request.key, scores={}, features=features, errors=(None,) * size
            )
            self.most, self.asked = max(self.most, len(self.alive)), self.asked + size
            yield ScoredGroup(rollouts=kept, scores=scores)
            del kept

    def serve_while(self, work: Callable[[], Any]) -> Any:
        return work()

    def start(self, entropy: float) -> None:
        assert 0.4 < entropy < 0.6

    def seed(self, starts: Mapping[str, Any]) -> dict[str, float]:
        self.seeded = starts[MAIN_SPACE]
        return {MAIN_SPACE: 0.0}

    def refresh_moments(self) -> None:
        pass


class Rollouts(RolloutGroup):
    """One that can be asked after."""

    __slots__ = ("__weakref__",)
    __hash__ = object.__hash__


def test_of_ten_thousand_seed_images_the_features_are_kept() -> None:
    config, fleet = small_config(rewards={"loo_fid": {"seed_images": 10_000}}), Drawing()
    prepare(config, fleet, {MAIN_SPACE: RewardSpace()})  # type: ignore[arg-type]
    assert fleet.asked == len(fleet.seeded) == 10_000
    expected = np.random.default_rng(0).random((10_000, 3), np.float32)[:, :2]
    np.testing.assert_array_equal(fleet.seeded, expected)
    assert fleet.most <= 2


def test_of_an_evaluations_images_the_features_are_kept() -> None:
    config, fleet = small_config(evaluation={"num_images": 2_000}), Drawing()
    real = RealImages({MAIN_SPACE: np.random.default_rng(1).random((300, 2), np.float32)})
    figures = evaluate_policy(config, fleet, config.sampling, real)  # type: ignore[arg-type]
    assert figures["images"] == fleet.asked == 2_000
    assert fleet.sizes == {0}
    assert abs(figures["fid"]) < 0.01
    assert fleet.most <= 2


def test_images_of_an_evaluation_are_resized_and_no_others() -> None:
    """384 pixels to 256, as published figures of LlamaGen are measured."""
    config, fleet = small_config(evaluation={"num_images": 20, "image_size": 256}), Drawing()
    real = RealImages({MAIN_SPACE: np.random.default_rng(1).random((300, 2), np.float32)})
    evaluate_policy(config, fleet, config.sampling, real)  # type: ignore[arg-type]
    assert fleet.sizes == {256}
    trained = requests_for(config, config.conditions.conditions(), "train", 0)
    assert {request.image_size for request in trained} == {0}


def test_features_of_two_dimensions_are_not_compared() -> None:
    config, fleet = small_config(evaluation={"num_images": 20}), Drawing()
    real = RealImages({MAIN_SPACE: np.zeros((9, 5), np.float32)})
    with pytest.raises(DataError, match="have 5 dimensions, those of the evaluated images 2"):
        evaluate_policy(config, fleet, config.sampling, real)  # type: ignore[arg-type]
