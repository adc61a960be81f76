"""CLIP score: how well an image fits its text (Radford et al. 2021, 2103.00020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cluster.messages import Condition
from rewards.openclip import TextImageModel


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """CLIP score through open_clip."""

    model: str = "package://learner.miniature/networks/clip"
    """open_clip model name, or a directory with open_clip_config.json and weights."""
    pretrained: str = ""
    """open_clip pretrained tag or a checkpoint file; empty for a directory."""


class ClipReward:
    """Cosine of image and text features, no logit scale: about [-1, 1], higher is better.

    Preprocessing is the model's own transform. An image that already has the model's size needs no
    resampling, and takes a path without PIL that gives the same pixels.
    """

    def __init__(self, config: ClipConfig, device: str = "cpu") -> None:
        self._model = TextImageModel(config.model, config.pretrained, device)
        self._transform = self._model.transform()
        self._mean, self._std = self._model.mean_std()

    def __call__(self, images: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
        """(N, H, W, 3) uint8 and N conditions -> (N,) float32."""
        texts = [condition.text for condition in conditions]
        return self._model.cosine(self.preprocess(images), texts).numpy()

    def preprocess(self, images: np.ndarray) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, 3, S, S) fp32, normalised."""
        if images.shape[1:3] == (self._model.image_size, self._model.image_size):
            pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
            return (pixels.float() / 255 - self._mean) / self._std
        return torch.stack([self._transform(Image.fromarray(image)) for image in images])
