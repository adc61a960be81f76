"""Real images by name: "digits:train", "digits:held-out", or an .npz file of samples."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cluster.errors import DataError
from cluster.io.paths import expand_user
from cluster.model_files.file_kinds import described
from cluster.model_files.tensors import locate
from cluster.program.streams import printable
from rewards.images.sources import SampleImages, open_source

DIGITS = "digits:"
AT_ONCE = 1024  # images


def load_images(source: str) -> np.ndarray:
    """Real images (N, H, W, 3) uint8.

    Raises:
        DataError: no such set, or a file without uint8 images.
    """
    if source.startswith(DIGITS):
        from learner.data.digits import digits

        try:
            return digits(source.removeprefix(DIGITS))[0]
        except ValueError as error:
            raise DataError(f"images {source!r}: {error}") from None
    return np.concatenate([*iterate_images(source, AT_ONCE)])


def iterate_images(source: str, batch: int) -> Iterator[np.ndarray]:
    """The images of `load_images` in batches (B, H, W, 3), read lazily.

    Raises:
        DataError: as `load_images`.
    """
    if source.startswith(DIGITS):
        images = load_images(source)
        yield from (images[at : at + batch] for at in range(0, len(images), batch))
        return
    samples = _samples(source)
    for at in range(0, len(samples), batch):
        read = samples.read(at, at + batch)
        yield np.stack([image.pixels for image in read if image.pixels is not None])


def load_labels(source: str) -> np.ndarray:
    """Classes (N,) int64 of the images of `load_images`.

    Raises:
        DataError: no such set, or a file that has none.
    """
    if source.startswith(DIGITS):
        from learner.data.digits import digits

        return digits(source.removeprefix(DIGITS))[1].astype(np.int64)
    return _samples(source).classes().indices


def _samples(source: str) -> SampleImages:
    """Raises DataError for a folder, or another kind of file."""
    expected = "expected an .npz file of samples, arr_0 (N, H, W, 3) uint8 and, for classes, arr_1"
    if expand_user(source).is_dir():
        raise DataError(f"{printable(source)}: {expected}, found a folder: write its images as one")
    found = open_source(str(locate(source)))
    if not isinstance(found, SampleImages):
        raise DataError(f"{printable(source)}: {expected}, found {described(locate(source))}")
    return found
