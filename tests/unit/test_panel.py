from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from cluster.errors import DataError
from cluster.messages import Condition
from rewards.panel import Panel

CONDITIONS = [Condition(text=str(index), class_index=index) for index in range(4)]


def images(*brightness: int) -> np.ndarray:
    return np.stack([np.full((2, 2, 3), value, np.uint8) for value in brightness])


def mean(batch: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
    return batch.mean((1, 2, 3)).astype(np.float32)


class Features:
    fingerprint = "test"

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        return np.stack([batch.mean((1, 2, 3)), batch.max((1, 2, 3))], -1).astype(np.float32)


def refuses_black(batch: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
    if (batch.max((1, 2, 3)) == 0).any():
        raise ValueError("black image")
    return mean(batch, conditions)


def test_scores_and_features() -> None:
    judged = Panel({"mean": mean}, {"net": Features()}).judge(images(1, 2, 3, 4), CONDITIONS)
    assert judged.scores["mean"].tolist() == [1, 2, 3, 4]
    assert judged.features["net"].shape == (4, 2)
    assert judged.errors == (None,) * 4


def test_one_bad_image_spoils_no_other() -> None:
    panel = Panel({"picky": refuses_black, "mean": mean}, {"net": Features()})
    judged = panel.judge(images(1, 0, 3, 4), CONDITIONS)
    assert judged.errors == (None, "picky: ValueError: black image", None, None)
    for values in (*judged.scores.values(), *judged.features.values()):
        assert np.isnan(values[1]).all()  # a failed image carries no number at all
        assert np.isfinite(values[[0, 2, 3]]).all()


def test_a_score_that_is_not_finite_is_an_error() -> None:
    def odd(batch: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
        return np.array([1, np.inf, 2, np.nan])

    judged = Panel({"odd": odd}, {"net": Features()}).judge(images(1, 2, 3, 4), CONDITIONS)
    assert judged.errors == (None, "odd: not finite", None, "odd: not finite")


def test_features_that_are_not_finite_are_an_error() -> None:
    class Broken(Features):
        def __call__(self, batch: np.ndarray) -> np.ndarray:
            features = super().__call__(batch)
            features[batch.max((1, 2, 3)) == 2, 1] = np.nan
            return features

    judged = Panel({"mean": mean}, {"net": Broken()}).judge(images(1, 2, 3, 4), CONDITIONS)
    assert judged.errors == (None, "net: not finite", None, None)
    assert np.isnan(judged.scores["mean"][1])


def test_a_scorer_that_always_fails_is_not_hidden() -> None:
    def broken(batch: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
        raise RuntimeError("no weights")

    with pytest.raises(RuntimeError, match="no weights"):
        Panel({"broken": broken}, {"net": Features()}).judge(images(1, 2, 3, 4), CONDITIONS)


def test_a_malformed_batch_is_refused() -> None:
    with pytest.raises(DataError, match="non-empty"):
        Panel({"mean": mean}, {"net": Features()}).judge(
            np.zeros((2, 2, 3), np.uint8), CONDITIONS[:2]
        )
