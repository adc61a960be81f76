"""Real images that have a name: "digits:train", "mnist:held-out" and so on, in fixed splits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cluster.errors import DataError
from learner.data.splits import SPLITS, Split

Arrays = tuple[np.ndarray, np.ndarray]
"""Images (N, H, W, 3) uint8 and labels (N,) int64."""
CLASSES = 10  # of every set: the digits, in the order of the labels


def _digits(split: Split) -> Arrays:
    from learner.data.digits import digits  # scikit-learn takes a second to import

    return digits(split)


def _mnist(split: Split) -> Arrays:
    from learner.data.mnist import mnist

    return mnist(split)


SETS: dict[str, Callable[[Split], Arrays]] = {"digits": _digits, "mnist": _mnist}
"""Name -> its images and labels, by split."""
NAMES = tuple(f"{name}:{split}" for name in SETS for split in SPLITS)


def is_named(source: str) -> bool:
    """Whether a source of real images is a named set, of whatever split."""
    name, colon, _ = source.partition(":")
    return bool(colon) and name in SETS


def read_named(source: str) -> Arrays:
    """Images and labels of a named set.

    Raises:
        ConfigError: the package with the images is not installed.
        DataError: no such split.
    """
    name, _, wanted = source.partition(":")
    for split in SPLITS:
        if split == wanted:
            return SETS[name](split)
    raise DataError(f"images {source!r}: split must be 'train' or 'held-out', found {wanted!r}")
