"""The fixed split of a set of real images with classes."""

from __future__ import annotations

from typing import Literal

import numpy as np

Split = Literal["train", "held-out"]
SPLITS: tuple[Split, ...] = ("train", "held-out")


def stratified_part(
    gray: np.ndarray, labels: np.ndarray, split: Split, num_train: int
) -> tuple[np.ndarray, np.ndarray]:
    """One part of a set, with each class's share in both parts; independent of a run's seed.

    Args:
        gray: (N, H, W) uint8.
        labels: (N,) integers.
        num_train: images of the part "train".

    Returns:
        Images (n, H, W, 3) uint8 and labels (n,) int64.

    Raises:
        ValueError: no such part.
    """
    from sklearn.model_selection import train_test_split  # takes a second

    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'held-out', found {split!r}")
    parts = train_test_split(gray, labels, train_size=num_train, stratify=labels, random_state=0)
    images, classes = parts[SPLITS.index(split) :: len(SPLITS)]
    return np.repeat(images[..., None], 3, axis=-1), classes.astype(np.int64)
