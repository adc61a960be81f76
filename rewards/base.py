"""What scorers and feature extractors are, and what images they take.

Shapes: N images, H W pixels, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from cluster.errors import DataError
from cluster.messages import Condition

MIN_SIDE = 2  # pixels
Images = np.ndarray | Sequence[np.ndarray]
"""(N, H, W, 3) uint8, or N arrays (H, W, 3) uint8 of any sizes."""


class Scorer(Protocol):
    """One number an image.

    A scorer that cannot take some of the images raises `RowErrors`; it is then asked again for the
    others. It may have a method `warm() -> None`, which is called once before it serves.
    """

    def __call__(self, images: Images, conditions: Sequence[Condition]) -> np.ndarray:
        """N uint8 images and N conditions -> (N,) float32."""
        ...


class FeatureExtractor(Protocol):
    """One vector an image: the space in which distributions are compared.

    It may have a method `warm() -> None`, which is called once before it serves, and an attribute
    `dim`: D, or 0 as long as that is not known.
    """

    @property
    def fingerprint(self) -> str:
        """Names network, weights and preprocessing; moments of different prints never mix."""
        ...

    def __call__(self, images: Images) -> np.ndarray:
        """N uint8 images -> (N, D) float32."""
        ...


class RowErrors(DataError):  # noqa: N818 - it carries several
    """Some images (or their conditions) cannot be scored; the others can.

    Args:
        errors: row of the batch -> what is wrong with it, and what to do.
    """

    def __init__(self, errors: Mapping[int, str]) -> None:
        self.errors = dict(errors)
        row, first = next(iter(self.errors.items()))
        super().__init__(f"{len(self.errors)} images cannot be scored; image {row}: {first}")

    def __reduce__(self) -> tuple[type[RowErrors], tuple[dict[int, str]]]:
        return type(self), (self.errors,)


def check_images(images: np.ndarray) -> None:
    """Refuse anything but a non-empty (N, H, W, 3) uint8 batch.

    Raises:
        DataError: says what was found.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or images.size == 0:
        raise DataError(
            "images must be a non-empty (N, H, W, 3) array of uint8, "
            f"found {images.dtype} of shape {images.shape}"
        )


def by_size(images: Images) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images of one size at a time, for networks that take batches.

    Yields:
        Rows (n,) of the batch, and their images (n, H, W, 3) uint8.
    """
    if isinstance(images, np.ndarray):
        yield np.arange(len(images)), images
        return
    rows: dict[tuple[int, ...], list[int]] = {}
    for row, image in enumerate(images):
        rows.setdefault(image.shape, []).append(row)
    for same in rows.values():
        yield np.array(same), np.stack([images[row] for row in same])


def image_fault(image: np.ndarray) -> str | None:
    """What keeps one image from being scored, or None for an (H, W, 3) uint8 image."""
    if image.dtype != np.uint8:
        odd = ""
        if np.issubdtype(image.dtype, np.floating) and not np.isfinite(image).all():
            odd = " with values that are not finite"
        return f"images must be uint8 in 0..255, found {image.dtype}{odd}"
    if image.ndim != 3 or image.shape[-1] != 3:
        return f"images must be RGB, (H, W, 3), found shape {image.shape}"
    if min(image.shape[:2]) < MIN_SIDE:
        return (
            f"images must have at least {MIN_SIDE} pixels a side, found "
            f"{image.shape[0]} x {image.shape[1]}"
        )
    return None
