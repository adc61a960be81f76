"""Real images by name: "digits:train", "digits:held-out", or an .npz file of samples."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cluster.errors import DataError
from cluster.sealing import DAMAGED_ARRAYS
from cluster.tensors import locate
from rewards.base import check_images
from rewards.reference_images import CLASSES, SAMPLES, SampleImages

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


def iterate_images(source: str, batch: int) -> Iterator[np.ndarray]:
    """The images of `load_images`, (B, H, W, 3) at a time: a file is read as far as it is asked
    for.

    Raises:
        DataError: as `load_images`, when it comes to it.
    """
    if source.startswith(DIGITS):
        images = load_images(source)
        yield from (images[at : at + batch] for at in range(0, len(images), batch))
        return
    try:
        samples = SampleImages(locate(source))
        for at in range(0, len(samples), batch):
            read = samples.read(at, at + batch)
            yield np.stack([image.pixels for image in read if image.pixels is not None])
    except DAMAGED_ARRAYS as error:
        raise DataError(f"{source}: not a readable .npz file ({error})") from error


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
