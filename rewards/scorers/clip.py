"""CLIP score: how well an image fits its text (Radford et al. 2021, 2103.00020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewards.networks.open_clip_models import TextImageModel
from rewards.networks.preprocessing import Preprocess, fault, preprocess, to_device
from rewards.scorers.config import ScorerTerm
from rewards.scorers.text_image import TextImageConfig, TextImageScorer


@dataclass(frozen=True, kw_only=True)
class ClipConfig(TextImageConfig):
    """CLIP score through open_clip."""

    model: str = "package://learner.miniature/networks/clip"
    """open_clip model name, hf-hub:owner/name, or a directory with open_clip_config.json and
    weights."""
    pretrained: str = ""
    """open_clip pretrained tag or a checkpoint file (.pt, .safetensors); empty for a directory and
    for hf-hub models."""
    preprocessing: Literal["device", "host"] = "device"
    """Where images are preprocessed. device: in batches on the model's device, with the same pixels
    as the model's own transform. host: that transform itself, image by image; slower, for
    transforms that device refuses."""

    def load(self, device: str) -> ClipReward:
        return ClipReward(self, device)


@dataclass(frozen=True, kw_only=True)
class ClipTerm(ClipConfig, ScorerTerm):
    """Text-image score."""

    weight: float = 1.0
    """Factor of the normalised reward; 0 logs it only."""

    def __post_init__(self) -> None:
        ClipConfig.__post_init__(self)
        ScorerTerm.__post_init__(self)


class ClipReward(TextImageScorer):
    """Cosine of image and text features without logit scale, in [-1, 1]; higher is better."""

    def __init__(self, config: ClipConfig, device: str = "cpu") -> None:
        model = TextImageModel(
            config.model, config.pretrained, device, config.precision, tag=config.tag
        )
        super().__init__(model, config.prompts, config.batch_size)
        self._transform = model.transform() if config.preprocessing == "host" else None
        self._pixels = None if self._transform else Preprocess.of(model.preprocess_config)

    def preprocess(self, images: np.ndarray) -> Tensor:
        """(n, H, W, 3) uint8 -> (n, 3, h, w) fp32 on the device: the model's own transform."""
        if self._pixels is not None:
            return preprocess(to_device(images, self._model.device), self._pixels)
        assert self._transform is not None
        done = [self._transform(Image.fromarray(image)) for image in images]
        return torch.stack(done).to(self._model.device)

    def size_fault(self, height: int, width: int) -> str | None:
        return None if self._pixels is None else fault(height, width, self._pixels)
