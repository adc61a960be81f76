"""A panel of scorers that judge the same images, each image on its own merits and faults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.messages import Condition
from rewards.base import FeatureExtractor, Scorer, check_images


@dataclass(frozen=True)
class PanelScores:
    """Row i belongs to image i; rows of failed images are NaN."""

    scores: dict[str, np.ndarray]
    """Scorer name -> (N,) float32"""
    features: dict[str, np.ndarray]
    """Feature space -> (N, D) float32"""
    errors: tuple[str | None, ...]


class Panel:
    """Named scorers and feature extractors."""

    def __init__(
        self, scorers: Mapping[str, Scorer], extractors: Mapping[str, FeatureExtractor]
    ) -> None:
        self._scorers = dict(scorers)
        self.extractors = dict(extractors)

    def judge(self, images: np.ndarray, conditions: Sequence[Condition]) -> PanelScores:
        """Score (N, H, W, 3) uint8 images with their N conditions.

        An image that a scorer fails on (exception or non-finite value) gets the error and NaN
        everywhere; the others are scored as if it had not been there.

        Raises:
            DataError: the batch as a whole is malformed.
        """
        check_images(images)
        errors: list[str | None] = [None] * len(images)
        scores = {
            name: _guarded(name, scorer, images, conditions, errors)
            for name, scorer in self._scorers.items()
        }
        features = {
            space: _guarded(space, _as_scorer(extract), images, conditions, errors)
            for space, extract in self.extractors.items()
        }
        failed = np.array([error is not None for error in errors])
        for values in (*scores.values(), *features.values()):
            values[failed] = np.nan
        return PanelScores(scores, features, tuple(errors))


def _as_scorer(extract: FeatureExtractor) -> Scorer:
    return lambda images, conditions: extract(images)


def _guarded(
    name: str,
    score: Scorer,
    images: np.ndarray,
    conditions: Sequence[Condition],
    errors: list[str | None],
) -> np.ndarray:
    """Score a batch; when it fails as a whole, image by image, to find whose fault it is."""
    try:
        values = np.array(score(images, conditions), dtype=np.float32)
    except Exception as batch_error:  # a scorer may be anyone's code: its error becomes data
        alone = _one_by_one(name, score, images, conditions, errors)
        if alone is None:
            raise batch_error
        values = alone
    finite = np.isfinite(values.reshape(len(images), -1)).all(1)
    for index in np.flatnonzero(~finite):
        errors[index] = errors[index] or f"{name}: not finite"
    return values


def _one_by_one(
    name: str,
    score: Scorer,
    images: np.ndarray,
    conditions: Sequence[Condition],
    errors: list[str | None],
) -> np.ndarray | None:
    """Values with NaN rows for the images that fail alone; None where every one fails."""
    rows: list[np.ndarray | None] = []
    for index in range(len(images)):
        one = slice(index, index + 1)
        try:
            rows.append(np.asarray(score(images[one], conditions[one]), dtype=np.float32)[0])
        except Exception as error:
            rows.append(None)
            errors[index] = errors[index] or f"{name}: {type(error).__name__}: {error}"
    shape = next((row.shape for row in rows if row is not None), None)
    if shape is None:
        return None
    return np.stack([np.full(shape, np.nan, np.float32) if row is None else row for row in rows])
