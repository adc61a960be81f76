"""The protocols of scorers and feature extractors, and the images they take.

Shapes: N images, H W pixels, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cluster.errors import DataError
from cluster.messages import Condition
from cluster.roles import Pictures

MIN_SIDE = 2  # pixels
Images = Pictures
"""(N, H, W, 3) uint8, or N arrays (H, W, 3) uint8 of any sizes."""


@dataclass(frozen=True, kw_only=True)
class ImageWork:
    """What a network computes for one image."""

    flops: float
    """Operations; a product and its sum are two."""
    bf16: bool = False
    convolutions: bool = False
    """Not the products of a transformer."""


class Scorer(Protocol):
    """One number an image.

    A scorer that cannot take some of the images raises `ImageErrors`; it is then called again with
    the others. An optional method `warm() -> None` is called once before the server serves.
    """

    def __call__(self, images: Images, conditions: Sequence[Condition]) -> np.ndarray:
        """N uint8 images and N conditions -> (N,) float32."""
        ...


class FeatureExtractor(Protocol):
    """One vector an image: the space in which distributions are compared.

    Optional: a method `warm() -> None`, called once before the server serves, an attribute
    `dim`: D, or 0 while unknown, and an attribute `further`: names and dimensions of further spaces
    of the same pass, in the columns after the first D (`split_spaces`).
    """

    @property
    def fingerprint(self) -> str:
        """Identifies network, weights and preprocessing; moments of two fingerprints never mix."""
        ...

    def __call__(self, images: Images) -> np.ndarray:
        """N uint8 images -> (N, D) float32."""
        ...


class ImageErrors(DataError):  # noqa: N818 - it carries several
    """Some images of a call (or their conditions) cannot be scored; the others can.

    Args:
        errors: index of the image in the call -> what is wrong with it, and what to do.
    """

    def __init__(self, errors: Mapping[int, str]) -> None:
        self.errors = dict(errors)
        index, first = next(iter(self.errors.items()))
        super().__init__(f"{len(self.errors)} images cannot be scored; image {index}: {first}")

    def __reduce__(self) -> tuple[type[ImageErrors], tuple[dict[int, str]]]:
        return type(self), (self.errors,)


RowErrors = ImageErrors  # the former name, kept for one release


def split_spaces(
    space: str, extractor: FeatureExtractor, values: np.ndarray
) -> dict[str, np.ndarray]:
    """An extractor's values (N, D + ...) by space: its own, and its `further` ones."""
    further: Mapping[str, int] = getattr(extractor, "further", {})
    at = max(values.shape[1] - sum(further.values()), 0)
    found = {space: values[:, :at]}
    for name, width in further.items():
        found[name] = values[:, at : at + width]
        at += width
    return found


def by_size(images: Images) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Group images by size, for networks that take batches.

    Yields:
        Indices (n,) of the images of one size, and these images (n, H, W, 3) uint8.
    """
    if isinstance(images, np.ndarray):
        yield np.arange(len(images)), images
        return
    indices: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        indices.setdefault(image.shape, []).append(index)
    for same in indices.values():
        yield np.array(same), np.stack([images[index] for index in same])


def image_fault(image: np.ndarray) -> str | None:
    """Why an image cannot be scored; None for an (H, W, 3) uint8 image."""
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
