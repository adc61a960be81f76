"""Feature extractors: the spaces in which image distributions are compared."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cluster.errors import DataError
from cluster.tensors import locate
from rewards.base import FeatureExtractor
from rewards.convnet import load_convnet

MAX_PIXELS = 1024


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """The feature network of the distribution reward (or of a judge)."""

    network: Literal["convnet", "pixels"] = "convnet"
    """convnet: a small convolutional network. pixels: nothing learned, for small images."""
    checkpoint: str = "package://learner.miniature/networks/features.safetensors"
    """Weights of a convnet: a safetensors file."""


class ConvNetFeatures:
    """Features of a `ConvNet`."""

    def __init__(self, checkpoint: str, device: str) -> None:
        self._network = load_convnet(checkpoint, device)
        digest = hashlib.sha256(locate(checkpoint).read_bytes()).hexdigest()
        self.fingerprint = f"convnet-{digest[:16]}"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(N, S, S, 3) uint8 -> (N, D) float32."""
        return self._network.run(images)[0]


class PixelFeatures:
    """Brightness of every pixel, in [0, 1]: a space that no training has shaped."""

    fingerprint = "pixels"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 -> (N, H * W) float32.

        Raises:
            DataError: too many pixels for a covariance.
        """
        count, height, width, _ = images.shape
        if height * width > MAX_PIXELS:
            raise DataError(
                f"pixel features are for images of at most {MAX_PIXELS} pixels, found "
                f"{height} x {width}: choose a network"
            )
        return images.mean(-1, dtype=np.float32).reshape(count, -1) / 255


def load_features(config: FeaturesConfig, device: str = "cpu") -> FeatureExtractor:
    """The extractor that a configuration names."""
    if config.network == "pixels":
        return PixelFeatures()
    return ConvNetFeatures(config.checkpoint, device)
