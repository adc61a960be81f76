"""Runs several scorers on the same images; the error of an image affects no other image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import DataError
from cluster.messages import Condition
from cluster.program.precision import is_refusal, refusal, refusals_explained
from rewards.base import (
    FeatureExtractor,
    ImageErrors,
    Images,
    Scorer,
    image_fault,
    split_spaces,
)
from rewards.scorers.isolation import describe, of_the_user, one_line


class WrongShapeError(DataError):
    """A scorer returned another number of values than it got images: its fault, not an image's."""


Score = Callable[[Images, Sequence[Condition]], np.ndarray]


@dataclass(frozen=True)
class PanelScores:
    """Scores, features and errors of N images, in order; NaN for failed images."""

    scores: dict[str, np.ndarray]
    """Scorer name -> (N,) float32"""
    features: dict[str, np.ndarray]
    """Feature space -> (N, D) float32; D is 0 if all images failed."""
    errors: tuple[str | None, ...]

    def part(self, first: int, count: int) -> PanelScores:
        """Those of images first..first+count-1."""
        part = slice(first, first + count)
        return PanelScores(
            {name: values[part] for name, values in self.scores.items()},
            {space: values[part] for space, values in self.features.items()},
            self.errors[part],
        )


class Panel:
    """Named scorers and feature extractors; they get the same images as read-only arrays.

    Args:
        max_batch: most images of a call.
    """

    def __init__(
        self,
        scorers: Mapping[str, Scorer],
        extractors: Mapping[str, FeatureExtractor],
        max_batch: int | None = None,
    ) -> None:
        self._scorers = dict(scorers)
        self.extractors = dict(extractors)
        self._max_batch = max_batch
        self.running = ""
        """Name of the scorer or feature space that runs; else empty."""

    def warm(self) -> None:
        """Warm up scorers and extractors."""
        for name, part in (*self._scorers.items(), *self.extractors.items()):
            warm = getattr(part, "warm", None)
            if warm is not None:
                with refusals_explained(name):
                    warm()

    def score(self, images: Images, conditions: Sequence[Condition]) -> PanelScores:
        """Score N uint8 images with their N conditions.

        A malformed image (1 pixel, not RGB, not uint8), and one that a scorer fails on (exception
        or non-finite value), gets the error and NaN in all columns; the scores of the others do not
        depend on it.

        Raises:
            DataError: the batch as a whole is malformed.
            WrongShapeError: a scorer returned another number of values than it got images.
            ConfigError: a scorer has no deterministic algorithm, and the run is to be reproducible.
        """
        _check_batch(images, conditions)
        images = _read_only(images)
        errors = [image_fault(image) for image in images]
        sound = np.flatnonzero([error is None for error in errors])
        kept = images if len(sound) == len(errors) else [images[index] for index in sound.tolist()]
        asked = [conditions[index] for index in sound.tolist()]

        def column(name: str, score: Score, empty: tuple[int, ...]) -> np.ndarray:
            self.running = name
            values, faults = _guarded(name, score, kept, asked, self._max_batch)
            for index, fault in faults.items():
                errors[sound[index]] = errors[sound[index]] or fault
            full = np.full((len(errors), *(empty if values is None else values.shape[1:])), np.nan)
            if values is not None:
                full[sound] = values
            return full.astype(np.float32)

        scores = {name: column(name, scorer, ()) for name, scorer in self._scorers.items()}
        features: dict[str, np.ndarray] = {}
        for space, extract in self.extractors.items():
            values = column(space, _as_score(extract), (0,))
            features |= split_spaces(space, extract, values)
        self.running = ""
        failed = np.array([error is not None for error in errors], dtype=bool)
        for values in (*scores.values(), *features.values()):
            values[failed] = np.nan
        return PanelScores(scores, features, tuple(errors))


def _check_batch(images: Images, conditions: Sequence[Condition]) -> None:
    if isinstance(images, np.ndarray) and images.ndim != 4:
        raise DataError(
            "images must be a non-empty (N, H, W, 3) array of uint8, or a list of such images; "
            f"found {images.dtype} of shape {images.shape}"
        )
    if not len(images):
        raise DataError("images must be non-empty: a request without images has no scores")
    if len(images) != len(conditions):
        raise DataError(f"found {len(images)} images, but {len(conditions)} conditions for them")


def _as_score(extract: FeatureExtractor) -> Score:
    return lambda images, conditions: extract(images)


def _guarded(
    name: str,
    score: Score,
    images: Images,
    conditions: Sequence[Condition],
    max_batch: int | None,
) -> tuple[np.ndarray | None, dict[int, str]]:
    """Values (N, ...), NaN for failed images (None if all failed), and the errors by index."""
    values: list[np.ndarray | None] = [None] * len(images)
    faults: dict[int, str] = {}
    size = max_batch or max(len(images), 1)
    for first in range(0, len(images), size):
        indices = range(first, min(first + size, len(images)))
        try:
            found, wrong = _attempt(score, [*indices], images, conditions)
        except WrongShapeError as error:
            raise WrongShapeError(f"{name}: {error}") from error
        except RuntimeError as error:  # `is_refusal`: the scorer's fault, not an image's
            raise refusal(error, name) from error
        for index, value in found.items():
            values[index] = value
        faults |= {index: f"{name}: {fault}" for index, fault in wrong.items()}
    shape = next((value.shape for value in values if value is not None), None)
    if shape is None:
        return None, faults
    stacked = np.stack([np.full(shape, np.nan) if v is None else v for v in values])
    finite = np.isfinite(stacked.reshape(len(stacked), -1)).all(1)
    for index in np.flatnonzero(~finite).tolist():
        faults.setdefault(index, f"{name}: not finite")
    return stacked, faults


def _attempt(
    score: Score, indices: list[int], images: Images, conditions: Sequence[Condition]
) -> tuple[dict[int, np.ndarray], dict[int, str]]:
    """Score images together; again without those that an ImageErrors names; one by one after any
    other exception."""
    faults: dict[int, str] = {}
    while indices:
        try:
            values = _call(score, indices, images, conditions)
            return dict(zip(indices, values, strict=True)), faults
        except ImageErrors as error:
            named = _image_errors(error, len(indices))
            if not named:
                break
            faults |= {indices[at]: fault for at, fault in named.items()}
            indices = [index for at, index in enumerate(indices) if at not in named]
        except WrongShapeError:
            raise
        except BaseException as error:  # user code may raise anything
            if of_the_user(error) or is_refusal(error):
                raise
            break
    alone, wrong = _one_by_one(score, indices, images, conditions)
    return alone, faults | wrong


def _one_by_one(
    score: Score, indices: list[int], images: Images, conditions: Sequence[Condition]
) -> tuple[dict[int, np.ndarray], dict[int, str]]:
    found: dict[int, np.ndarray] = {}
    faults: dict[int, str] = {}
    for index in indices:
        try:
            found[index] = _call(score, [index], images, conditions)[0]
        except ImageErrors as error:
            faults[index] = next(iter(_image_errors(error, 1).values()), describe(error))
        except BaseException as error:
            if of_the_user(error) or is_refusal(error):
                raise
            faults[index] = describe(error)
    return found, faults


def _image_errors(error: ImageErrors, count: int) -> dict[int, str]:
    """The errors of indices that the scorer was given."""
    named = error.errors.items()
    return {int(index): one_line(fault) for index, fault in named if index in range(count)}


def _read_only(images: Images) -> Images:
    """Views that cannot be written to."""
    if not isinstance(images, np.ndarray):
        return [_read_only(image) for image in images]  # type: ignore[misc]
    view = images.view()
    view.flags.writeable = False
    return view


def _call(
    score: Score, indices: list[int], images: Images, conditions: Sequence[Condition]
) -> np.ndarray:
    answer = score(_batch(images, indices), [conditions[index] for index in indices])
    values = np.array(answer, dtype=np.float32)  # a copy: the scorer may reuse its own
    if values.ndim < 1 or len(values) != len(indices):
        raise WrongShapeError(f"expected {len(indices)} rows of values, found shape {values.shape}")
    return values


def _batch(images: Images, indices: list[int]) -> Images:
    """Some of the images: an array, unless their sizes differ."""
    if isinstance(images, np.ndarray):
        return images if len(indices) == len(images) else _read_only(images[indices])
    picked = [images[index] for index in indices]
    same = len({image.shape for image in picked}) == 1
    return _read_only(np.stack(picked)) if same else picked
