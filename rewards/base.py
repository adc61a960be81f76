"""What scorers and feature extractors are, and what images they take.

Shapes: N images, H W pixels, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from cluster.errors import DataError
from cluster.messages import Condition


class Scorer(Protocol):
    """One number an image."""

    def __call__(self, images: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
        """(N, H, W, 3) uint8 and N conditions -> (N,) float32."""
        ...


class FeatureExtractor(Protocol):
    """One vector an image: the space in which distributions are compared."""

    @property
    def fingerprint(self) -> str:
        """Names network, weights and preprocessing; moments of different prints never mix."""
        ...

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 -> (N, D) float32."""
        ...


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
