"""HPSv2: a CLIP model fine-tuned on human preferences (Wu et al. 2023, 2306.09341).

The checkpoints (v2.0, v2.1) fit open_clip's ViT-H-14 exactly. What differs from plain CLIP is the
preprocessing, whose order is kept here: to float first, longest side to the model's size (bicubic
on the float tensor, antialiased), zero padding *before* normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.messages import Condition
from rewards.openclip import TextImageModel


@dataclass(frozen=True, kw_only=True)
class HpsConfig:
    """Human preference score."""

    model: str = "package://learner.miniature/networks/preference"
    """ViT-H-14 for the published checkpoints, or a directory in open_clip's layout."""
    pretrained: str = ""
    """The HPSv2 checkpoint file (HPS_v2_compressed.pt, HPS_v2.1_compressed.pt)."""


class HpsReward:
    """Cosine of image and text features of the preference model; higher is preferred."""

    def __init__(self, config: HpsConfig, device: str = "cpu") -> None:
        self._model = TextImageModel(config.model, config.pretrained, device)
        self._mean, self._std = self._model.mean_std()

    def __call__(self, images: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
        """(N, H, W, 3) uint8 and N conditions -> (N,) float32."""
        texts = [condition.text for condition in conditions]
        return self._model.cosine(self.preprocess(images), texts).numpy()

    def preprocess(self, images: np.ndarray) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, 3, S, S) fp32, normalised."""
        pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 255
        pixels = _fit(pixels, self._model.image_size)
        return (pixels - self._mean) / self._std


def _fit(pixels: Tensor, size: int) -> Tensor:
    """Longest side to `size`, then zero padding to a centred square; (N, 3, H, W)."""
    height, width = pixels.shape[-2:]
    scale = size / max(height, width)
    if scale != 1:
        new = (round(height * scale), round(width * scale))
        pixels = F.interpolate(
            pixels, size=new, mode="bicubic", align_corners=False, antialias=True
        )
    rows, columns = size - pixels.shape[-2], size - pixels.shape[-1]
    top, left = rows // 2, columns // 2
    return F.pad(pixels, (left, columns - left, top, rows - top))
