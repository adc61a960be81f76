"""A panel of scorers that score the same images, each image on its own merits and faults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import DataError
from cluster.messages import Condition
from rewards.base import FeatureExtractor, ImageErrors, Images, Scorer, image_fault
from rewards.scorers.isolation import describe, of_the_user, one_line


class WrongShapeError(DataError):
    """A scorer's answer has another number of rows than it was given images: a fault of the scorer,
    not of an image."""


Score = Callable[[Images, Sequence[Condition]], np.ndarray]


@dataclass(frozen=True)
class PanelScores:
    """Row i belongs to image i; rows of failed images are NaN."""

    scores: dict[str, np.ndarray]
    """Scorer name -> (N,) float32"""
    features: dict[str, np.ndarray]
    """Feature space -> (N, D) float32; D is 0 where no image could be scored."""
    errors: tuple[str | None, ...]

    def rows(self, first: int, count: int) -> PanelScores:
        """The part of some images."""
        part = slice(first, first + count)
        return PanelScores(
            {name: values[part] for name, values in self.scores.items()},
            {space: values[part] for space, values in self.features.items()},
            self.errors[part],
        )


class Panel:
    """Named scorers and feature extractors, which get the same images and must leave them alone:
    the arrays are read-only.

    Args:
        max_batch: most images that a scorer is given at once.
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
        self.at = ""
        """Name of the scorer or feature space that is being asked just now; else empty."""

    def warm(self) -> None:
        """Let scorers and extractors do what would make their first answer slow."""
        for part in (*self._scorers.values(), *self.extractors.values()):
            warm = getattr(part, "warm", None)
            if warm is not None:
                warm()

    def score(self, images: Images, conditions: Sequence[Condition]) -> PanelScores:
        """Score N uint8 images with their N conditions.

        An image that is none (1 pixel, not RGB, not uint8), or that a scorer fails on (exception or
        non-finite value), gets the error and NaN everywhere; the others are scored as if it had not
        been there.

        Raises:
            DataError: the batch as a whole is malformed.
            WrongShapeError: a scorer's answer has another number of rows than it got images.
        """
        _check_batch(images, conditions)
        images = _read_only(images)
        errors = [image_fault(image) for image in images]
        sound = np.flatnonzero([error is None for error in errors])
        kept = images if len(sound) == len(errors) else [images[row] for row in sound.tolist()]
        asked = [conditions[row] for row in sound.tolist()]

        def column(name: str, score: Score, empty: tuple[int, ...]) -> np.ndarray:
            self.at = name
            values, faults = _guarded(name, score, kept, asked, self._max_batch)
            for row, fault in faults.items():
                errors[sound[row]] = errors[sound[row]] or fault
            full = np.full((len(errors), *(empty if values is None else values.shape[1:])), np.nan)
            if values is not None:
                full[sound] = values
            return full.astype(np.float32)

        scores = {name: column(name, scorer, ()) for name, scorer in self._scorers.items()}
        features = {
            space: column(space, _as_score(extract), (0,))
            for space, extract in self.extractors.items()
        }
        self.at = ""
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
    """Values (N, ...) with NaN rows for the images that failed (None if all did), and what was
    wrong with each of these."""
    values: list[np.ndarray | None] = [None] * len(images)
    faults: dict[int, str] = {}
    size = max_batch or max(len(images), 1)
    for first in range(0, len(images), size):
        rows = range(first, min(first + size, len(images)))
        try:
            found, wrong = _attempt(score, [*rows], images, conditions)
        except WrongShapeError as error:
            raise WrongShapeError(f"{name}: {error}") from error
        for row, value in found.items():
            values[row] = value
        faults |= {row: f"{name}: {fault}" for row, fault in wrong.items()}
    shape = next((value.shape for value in values if value is not None), None)
    if shape is None:
        return None, faults
    stacked = np.stack([np.full(shape, np.nan) if v is None else v for v in values])
    finite = np.isfinite(stacked.reshape(len(stacked), -1)).all(1)
    for row in np.flatnonzero(~finite).tolist():
        faults.setdefault(row, f"{name}: not finite")
    return stacked, faults


def _attempt(
    score: Score, rows: list[int], images: Images, conditions: Sequence[Condition]
) -> tuple[dict[int, np.ndarray], dict[int, str]]:
    """Score some rows together; without those the scorer names, or one by one if it names none."""
    faults: dict[int, str] = {}
    while rows:
        try:
            return dict(zip(rows, _call(score, rows, images, conditions), strict=True)), faults
        except ImageErrors as error:
            named = _image_errors(error, len(rows))
            if not named:  # none that it was given: no use to ask again
                alone, wrong = _one_by_one(score, rows, images, conditions)
                return alone, faults | wrong
            faults |= {rows[index]: fault for index, fault in named.items()}
            rows = [row for index, row in enumerate(rows) if index not in named]
        except WrongShapeError:
            raise
        except BaseException as error:  # a scorer may be anyone's code: its error becomes data
            if of_the_user(error):
                raise
            alone, wrong = _one_by_one(score, rows, images, conditions)
            return alone, faults | wrong
    return {}, faults


def _one_by_one(
    score: Score, rows: list[int], images: Images, conditions: Sequence[Condition]
) -> tuple[dict[int, np.ndarray], dict[int, str]]:
    found: dict[int, np.ndarray] = {}
    faults: dict[int, str] = {}
    for row in rows:
        try:
            found[row] = _call(score, [row], images, conditions)[0]
        except ImageErrors as error:
            faults[row] = next(iter(_image_errors(error, 1).values()), describe(error))
        except BaseException as error:
            if of_the_user(error):
                raise
            faults[row] = describe(error)
    return found, faults


def _image_errors(error: ImageErrors, count: int) -> dict[int, str]:
    """What a scorer says of its rows, as far as these are rows that it was given."""
    named = error.errors.items()
    return {int(row): one_line(fault) for row, fault in named if row in range(count)}


def _read_only(images: Images) -> Images:
    """The same pixels, which whoever gets them cannot write to by mistake."""
    if not isinstance(images, np.ndarray):
        return [_read_only(image) for image in images]  # type: ignore[misc]
    view = images.view()
    view.flags.writeable = False
    return view


def _call(
    score: Score, rows: list[int], images: Images, conditions: Sequence[Condition]
) -> np.ndarray:
    answer = score(_batch(images, rows), [conditions[row] for row in rows])
    values = np.array(answer, dtype=np.float32)  # a copy: the scorer may use its own again
    if values.ndim < 1 or len(values) != len(rows):
        raise WrongShapeError(f"expected {len(rows)} rows of values, found shape {values.shape}")
    return values


def _batch(images: Images, rows: list[int]) -> Images:
    """Some of the images: an array, unless their sizes differ."""
    if isinstance(images, np.ndarray):
        return images if len(rows) == len(images) else _read_only(images[rows])
    picked = [images[row] for row in rows]
    same = len({image.shape for image in picked}) == 1
    return _read_only(np.stack(picked)) if same else picked
