"""Captions of the 8x8 digits: the digit, how heavy its strokes are, and how it leans.

Weight and slant are measured from the pixels, in numpy. Weight is the mean ink, cut at the terciles
of all training digits, for which it hardly depends on the digit. Slant is the shear of the ink's
second moments, as in the deskewing of handwriting, cut at the terciles of the training images of
the same digit: a seven's ink leans right by its shape alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import DataError
from learner.data.digits import CLASS_NAMES, digits
from learner.data.splits import Split

WEIGHTS = ("thin", "medium", "bold")
SLANTS = ("leaning left", "upright", "leaning right")
TEMPLATE = "a {weight} digit {name} {slant}"
TERCILES = (1 / 3, 2 / 3)


def measure(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight and slant of N images of bright ink on black, (N, H, W) in [0, 1].

    Returns:
        Mean ink (N,) in [0, 1], and shear (N,) in pixels to the right for each pixel upwards,
        -mu_xy / mu_yy of the ink's central moments; 0 for images without ink, or with ink in a
        single row.

    Raises:
        DataError: not (N, H, W), or values outside [0, 1].
    """
    if images.ndim != 3 or not images.size or images.min() < 0 or images.max() > 1:
        raise DataError(
            f"images to measure must be (N, H, W) with ink from 0 to 1, found {images.dtype} of "
            f"shape {images.shape}"
        )
    ink = images.astype(np.float64)
    total = ink.sum((1, 2))
    safe = np.maximum(total, np.finfo(np.float64).tiny)[:, None, None]
    density = ink / safe
    rows, columns = (np.arange(side, dtype=np.float64) for side in images.shape[1:])
    down = rows[None, :, None] - (density * rows[:, None]).sum((1, 2))[:, None, None]
    right = columns[None, None, :] - (density * columns).sum((1, 2))[:, None, None]
    both, high = (density * right * down).sum((1, 2)), (density * down**2).sum((1, 2))
    leans = high > 1e-9
    shear = np.divide(-both, high, out=np.zeros_like(both), where=leans & (total > 0))
    return total / ink[0].size, shear


@dataclass(frozen=True)
class Cuts:
    """Terciles of the training images."""

    weight: np.ndarray
    """(2,) of the mean ink."""
    slant: np.ndarray
    """(10, 2) of the shear, by digit."""

    @classmethod
    def of(cls, images: np.ndarray, labels: np.ndarray) -> Cuts:
        """Terciles of images (N, H, W) in [0, 1] with labels (N,)."""
        ink, shear = measure(images)
        slants = [np.quantile(shear[labels == k], TERCILES) for k in range(len(CLASS_NAMES))]
        return cls(np.quantile(ink, TERCILES), np.stack(slants))

    def attributes(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """(N, 3) int64: digit, and places in `WEIGHTS` and `SLANTS`, of images (N, H, W) in
        [0, 1]."""
        ink, shear = measure(images)
        weight = (ink[:, None] >= self.weight).sum(1)
        slant = (shear[:, None] >= self.slant[labels]).sum(1)
        return np.stack([labels, weight, slant], axis=1).astype(np.int64)


@functools.cache
def training_cuts() -> Cuts:
    """The terciles of the 1,000 training digits."""
    images, labels = digits("train")
    return Cuts.of(ink_of(images), labels)


def ink_of(images: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) uint8 -> (N, H, W) in [0, 1]."""
    return images.mean(-1) / 255


def attributes_of(split: Split) -> np.ndarray:
    """Attributes (N, 3) of the digits of a split, in their order; see `Cuts.attributes`."""
    images, labels = digits(split)
    return training_cuts().attributes(ink_of(images), labels)


def captions_of(attributes: np.ndarray) -> list[str]:
    """The captions of attributes (N, 3)."""
    return [
        TEMPLATE.format(name=CLASS_NAMES[digit], weight=WEIGHTS[weight], slant=SLANTS[slant])
        for digit, weight, slant in attributes.tolist()
    ]


def numbers_of(attributes: np.ndarray) -> np.ndarray:
    """Places (N,) of attributes (N, 3) in `all_attributes`."""
    shape = (len(CLASS_NAMES), len(WEIGHTS), len(SLANTS))
    return np.ravel_multi_index(tuple(attributes.T), shape).astype(np.int64)


def all_attributes() -> np.ndarray:
    """(90, 3): every combination of attributes."""
    sizes: Sequence[int] = (len(CLASS_NAMES), len(WEIGHTS), len(SLANTS))
    return np.indices(sizes).reshape(len(sizes), -1).T.astype(np.int64)
