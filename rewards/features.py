"""Feature extractors: the spaces in which image distributions are compared."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from cluster.tensors import locate
from rewards.base import FeatureExtractor
from rewards.convnet import load_convnet


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """The feature network of the distribution reward (or of a judge)."""

    checkpoint: str = "package://learner.miniature/networks/features.safetensors"
    """Safetensors file of a small convolutional network."""


class ConvNetFeatures:
    """Features of a `ConvNet`'s linear layer, before its activation."""

    def __init__(self, checkpoint: str, device: str) -> None:
        self._network = load_convnet(checkpoint, device)
        digest = hashlib.sha256(locate(checkpoint).read_bytes()).hexdigest()
        self.fingerprint = f"convnet-{digest[:16]}"

    @property
    def dim(self) -> int:
        return self._network.config.features

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(N, S, S, 3) uint8 -> (N, D) float32."""
        return self._network.run(images)[0]


def load_features(config: FeaturesConfig, device: str = "cpu") -> FeatureExtractor:
    """The extractor that a configuration names."""
    return ConvNetFeatures(config.checkpoint, device)
