"""Class accuracy as a score: does a classifier see the class that was asked for?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.messages import Condition
from rewards.base import ImageErrors, Images, by_size
from rewards.networks.convnet import load_convnet


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """A classifier that judges whether an image shows its class."""

    checkpoint: str = "package://learner.miniature/networks/judge.safetensors"
    """Safetensors file of a small convolutional network; empty: class accuracy is not judged."""


class ClassifierAccuracy:
    """1 where the most likely class is the condition's, else 0."""

    def __init__(self, config: ClassifierConfig, device: str = "cpu") -> None:
        self._network = load_convnet(config.checkpoint, device)

    def __call__(self, images: Images, conditions: Sequence[Condition]) -> np.ndarray:
        """N images (S, S, 3) uint8 and N conditions -> (N,) float32.

        Raises:
            ImageErrors: a condition without a class, or with one that the classifier does not know.
        """
        known = self._network.config.num_classes
        wanted = [condition.class_index for condition in conditions]
        errors = {
            row: "class accuracy needs a condition with a class_index, found a caption"
            if index is None
            else f"class accuracy knows the classes 0..{known - 1}, found {index}"
            for row, index in enumerate(wanted)
            if index is None or not 0 <= index < known
        }
        if errors:
            raise ImageErrors(errors)
        predicted = np.empty(len(images), np.int64)
        for rows, same in by_size(images):
            predicted[rows] = self._network.run(same)[1].argmax(-1)
        return (predicted == np.array(wanted)).astype(np.float32)
