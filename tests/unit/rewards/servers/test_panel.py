from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest

from cluster.errors import DataError
from cluster.messages import Condition
from rewards.base import ImageErrors
from rewards.servers.panel import Panel

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
    scored = Panel({"mean": mean}, {"net": Features()}).score(images(1, 2, 3, 4), CONDITIONS)
    assert scored.scores["mean"].tolist() == [1, 2, 3, 4]
    assert scored.features["net"].shape == (4, 2)
    assert scored.errors == (None,) * 4


def test_one_bad_image_spoils_no_other() -> None:
    panel = Panel({"picky": refuses_black, "mean": mean}, {"net": Features()})
    scored = panel.score(images(1, 0, 3, 4), CONDITIONS)
    assert scored.errors[1].startswith("picky: ValueError: black image (test_panel.py, line ")
    assert scored.errors[::2] == (None, None)
    for values in (*scored.scores.values(), *scored.features.values()):
        assert np.isnan(values[1]).all()  # a failed image carries no number at all
        assert np.isfinite(values[[0, 2, 3]]).all()


def test_a_score_that_is_not_finite_is_an_error() -> None:
    def odd(batch: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
        return np.array([1, np.inf, 2, np.nan])

    scored = Panel({"odd": odd}, {"net": Features()}).score(images(1, 2, 3, 4), CONDITIONS)
    assert scored.errors == (None, "odd: not finite", None, "odd: not finite")


def test_features_that_are_not_finite_are_an_error() -> None:
    class Broken(Features):
        def __call__(self, batch: np.ndarray) -> np.ndarray:
            features = super().__call__(batch)
            features[batch.max((1, 2, 3)) == 2, 1] = np.nan
            return features

    scored = Panel({"mean": mean}, {"net": Broken()}).score(images(1, 2, 3, 4), CONDITIONS)
    assert scored.errors == (None, "net: not finite", None, None)
    assert np.isnan(scored.scores["mean"][1])


def test_a_scorer_that_always_fails_is_an_error_of_every_image() -> None:
    def broken(batch: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
        raise RuntimeError("no weights")

    scored = Panel({"broken": broken}, {"net": Features()}).score(images(1, 2, 3, 4), CONDITIONS)
    for error in scored.errors:
        assert re.fullmatch(r"broken: RuntimeError: no weights \(test_panel\.py, line \d+\)", error)


def test_a_malformed_batch_is_refused() -> None:
    with pytest.raises(DataError, match="non-empty"):
        Panel({"mean": mean}, {"net": Features()}).score(
            np.zeros((2, 2, 3), np.uint8), CONDITIONS[:2]
        )


GOOD = np.full((4, 4, 3), 9, np.uint8)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (GOOD[:1, :1], "at least 2 pixels a side, found 1 x 1"),
        (GOOD[:, :1], "at least 2 pixels a side, found 4 x 1"),
        (GOOD[:0], "at least 2 pixels a side, found 0 x 4"),
        (GOOD[..., 0], r"must be RGB, \(H, W, 3\), found shape \(4, 4\)"),
        (GOOD[..., :1], r"must be RGB, \(H, W, 3\), found shape \(4, 4, 1\)"),
        (np.concatenate([GOOD, GOOD[..., :1]], -1), r"found shape \(4, 4, 4\)"),
        (GOOD.astype(np.float32), r"must be uint8 in 0\.\.255, found float32$"),
        (GOOD * np.nan, "found float64 with values that are not finite"),
        (GOOD.astype(np.int64), r"must be uint8 in 0\.\.255, found int64"),
    ],
)
def test_what_is_no_image_gets_an_error_and_spoils_no_other(bad: np.ndarray, message: str) -> None:
    panel = Panel({"mean": mean}, {"net": Features()})
    scored = panel.score([GOOD, bad, GOOD + 1], CONDITIONS[:3])
    assert scored.errors[0] is scored.errors[2] is None
    assert re.search(message, scored.errors[1])
    assert scored.scores["mean"][[0, 2]].tolist() == [9, 10]
    assert np.isnan(scored.scores["mean"][1])
    assert np.isnan(scored.features["net"][1]).all()


def test_a_batch_of_floats_is_an_error_of_every_image() -> None:
    floats = images(1, 2, 3, 4).astype(np.float32) / 255
    scored = Panel({"mean": mean}, {"net": Features()}).score(floats, CONDITIONS)
    assert all("must be uint8" in error for error in scored.errors)
    assert scored.features["net"].shape == (4, 0)


@pytest.mark.parametrize(
    ("batch", "conditions", "message"),
    [
        (np.zeros((0, 4, 4, 3), np.uint8), 0, "must be non-empty: a request without images"),
        ([], 0, "must be non-empty"),
        ([GOOD, GOOD], 1, "found 2 images, but 1 conditions"),
    ],
)
def test_a_request_that_is_none_is_refused(batch, conditions: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Panel({"mean": mean}, {}).score(batch, CONDITIONS[:conditions])


def refuses_captions(batch: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
    """Names all rows that it cannot take, as scorers should."""
    odd = {
        row: f"unknown class {condition.class_index}"
        for row, condition in enumerate(conditions)
        if condition.class_index > 1
    }
    if odd:
        raise ImageErrors(odd)
    return mean(batch, conditions)


def test_rows_that_a_scorer_names_are_left_out_and_the_others_scored_together() -> None:
    sizes = []

    def counting(batch: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
        sizes.append(len(batch))
        return refuses_captions(batch, conditions)

    scored = Panel({"picky": counting}, {}).score(images(1, 2, 3, 4), CONDITIONS)
    assert sizes == [4, 2]
    assert scored.errors == (None, None, "picky: unknown class 2", "picky: unknown class 3")
    assert scored.scores["picky"][:2].tolist() == [1, 2]


def test_every_row_named_is_no_failure_of_the_scorer() -> None:
    scored = Panel({"picky": refuses_captions}, {}).score(images(1, 2), CONDITIONS[2:])
    assert scored.errors == ("picky: unknown class 2", "picky: unknown class 3")


def test_scorers_get_an_array_unless_sizes_differ() -> None:
    kinds = []

    def kind(batch: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
        kinds.append(type(batch).__name__)
        return np.array([image.mean() for image in batch], np.float32)

    panel = Panel({"kind": kind}, {})
    panel.score([GOOD, GOOD], CONDITIONS[:2])
    panel.score([GOOD, GOOD[:2]], CONDITIONS[:2])
    panel.score([GOOD, GOOD[:1, :1], GOOD], CONDITIONS[:3])
    assert kinds == ["ndarray", "list", "ndarray"]


def test_batches_are_no_larger_than_allowed() -> None:
    sizes = []

    def counting(batch: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
        sizes.append(len(batch))
        return mean(batch, conditions)

    scored = Panel({"mean": counting}, {}, max_batch=3).score(images(1, 2, 3, 4), CONDITIONS)
    assert sizes == [3, 1]
    assert scored.scores["mean"].tolist() == [1, 2, 3, 4]


def test_a_scorer_that_loses_rows_is_caught() -> None:
    panel = Panel({"short": lambda batch, conditions: np.zeros(1)}, {})
    with pytest.raises(DataError, match=r"short: expected 4 rows of values, found shape \(1,\)"):
        panel.score(images(1, 2, 3, 4), CONDITIONS)


def test_parts_of_a_judged_batch() -> None:
    scored = Panel({"mean": mean}, {"net": Features()}).score(images(1, 2, 3, 4), CONDITIONS)
    part = scored.part(1, 2)
    assert part.scores["mean"].tolist() == [2, 3]
    assert part.features["net"].shape == (2, 2)
    assert part.errors == (None, None)
