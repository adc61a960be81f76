"""Real images by name: "digits:train", "digits:held-out", or an .npz file of samples."""

from __future__ import annotations

import numpy as np

from cluster.errors import DataError
from cluster.sealing import DAMAGED_ARRAYS
from cluster.tensors import locate
from rewards.base import check_images
from rewards.reference_images import CLASSES, SAMPLES

DIGITS = "digits:"


def load_images(source: str) -> np.ndarray:
    """Real images (N, H, W, 3) uint8.

    Raises:
        DataError: no such set, or a file without uint8 images.
    """
    if source.startswith(DIGITS):
        from learner.miniature.data import digits

        try:
            return digits(source.removeprefix(DIGITS))[0]
        except ValueError as error:
            raise DataError(f"images {source!r}: {error}") from None
    images = _array(source, SAMPLES, "an array")
    check_images(images)
    return images


def load_labels(source: str) -> np.ndarray:
    """Classes (N,) int64 of the images of `load_images`.

    Raises:
        DataError: no such set, or a file that has none.
    """
    if source.startswith(DIGITS):
        from learner.miniature.data import digits

        return digits(source.removeprefix(DIGITS))[1].astype(np.int64)
    return _array(source, CLASSES, "the classes as").astype(np.int64)


def _array(source: str, key: str, what: str) -> np.ndarray:
    try:
        with np.load(locate(source), allow_pickle=False) as file:
            if key not in file:
                raise DataError(f"{source}: needs {what} {key!r}, found {file.files}")
            return file[key]
    except DAMAGED_ARRAYS as error:
        raise DataError(f"{source}: not a readable .npz file ({error})") from error
