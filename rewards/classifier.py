"""Class accuracy as a score: does a classifier see the class that was asked for?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import DataError
from cluster.messages import Condition
from rewards.convnet import load_convnet


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """A classifier that judges whether an image shows its class."""

    checkpoint: str = "package://learner.miniature/networks/judge.safetensors"
    """Safetensors file of a small convolutional network."""


class ClassifierAccuracy:
    """1 where the most likely class is the condition's, else 0."""

    def __init__(self, config: ClassifierConfig, device: str = "cpu") -> None:
        self._network = load_convnet(config.checkpoint, device)

    def __call__(self, images: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
        """(N, S, S, 3) uint8 and N conditions -> (N,) float32."""
        wanted = [condition.class_index for condition in conditions]
        if None in wanted:
            raise DataError("class accuracy needs conditions with a class_index, found a caption")
        predicted = self._network.run(images)[1].argmax(-1)
        return (predicted == np.array(wanted)).astype(np.float32)
