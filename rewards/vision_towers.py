"""DINOv2 and CLIP as feature spaces: a second opinion beside Inception's.

Shapes: N images, S the side the network takes, D feature dimensions.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cluster.errors import CheckpointError, ConfigError
from cluster.torchvision_ops import ensure_torchvision
from rewards.openclip import TextImageModel
from rewards.resize import centre_crop, normalise, resize_antialiased, shortest_side
from rewards.weight_files import brief, given, read_state

DINOV2 = "vit_large_patch14_dinov2.lvd142m"
DINOV2_SIZE = 224  # pixels a side, as in Stein et al. 2023; the weights were made with 518
CLIP = "ViT-B-32-quickgelu"  # CLIP-FID's (Kynkäänniemi et al. 2023, 2203.06026), with these weights
CLIP_TAG = "openai"


@dataclass(frozen=True)
class Preprocessing:
    """What an image goes through before a vision transformer: shorter side to `scale`, as PIL
    resizes; the middle of it; channels normalised."""

    size: int
    scale: int
    mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def fingerprint(self) -> str:
        numbers = ",".join(f"{value:g}" for value in (*self.mean, *self.std))
        return f"{self.mode}{self.scale}-crop{self.size}-{numbers}"

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> (N, 3, size, size) fp32."""
        shape = shortest_side(images.shape[-2], images.shape[-1], self.scale)
        pixels = centre_crop(resize_antialiased(images, shape, self.mode), self.size)
        return normalise(pixels / 255, self.mean, self.std)


def load_dinov2(model: str = "", checkpoint: str = "") -> tuple[nn.Module, Preprocessing]:
    """A vision transformer of timm whose output is its features, (N, D), on the CPU.

    DINOv2's (Oquab et al. 2023, 2304.07193) are the class token after the last norm. Position
    embeddings made for another image size are resampled once, by timm (bicubic, antialiased); the
    authors' own code resamples a little differently, so that features agree to some digits only.

    Args:
        model: a timm name; empty is `DINOV2`.
        checkpoint: .safetensors or .pth, of timm or of DINOv2's authors; empty or "published"
            fetches timm's.

    Raises:
        ConfigError: no model of that name, or one that does not fit here.
        CheckpointError: no such file, no network, or the file of another model.
    """
    ensure_torchvision()
    import timm

    model = model or DINOV2
    if not timm.is_model(model):
        close = timm.list_models(f"*{model.partition('.')[0]}*")[:3] or timm.list_models("*dinov2*")
        raise ConfigError(f"model: timm has no {model!r}; it has {', '.join(close)}")
    settings = _settings(timm.get_pretrained_cfg(model), model)
    overlay: dict[str, Any] = {}
    if given(checkpoint):
        overlay = {"state_dict": read_state(checkpoint)}
    try:
        network = timm.create_model(
            model,
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            num_classes=0,
            img_size=DINOV2_SIZE,
        )
    except TypeError as error:  # img_size is for transformers alone
        raise ConfigError(
            f"model: {model!r} is no vision transformer of a chosen image size ({brief(error)})"
        ) from error
    except Exception as error:  # of the hub, of the network, of a misfit: timm passes on any
        raise CheckpointError(_unloadable(model, checkpoint, error)) from error
    return network, settings


def _settings(config: Any, model: str) -> Preprocessing:
    if config is None or config.interpolation not in ("bicubic", "bilinear"):
        raise ConfigError(f"model: {model!r} has no preprocessing that is known here")
    scale = math.floor(DINOV2_SIZE / (config.crop_pct or 1.0))
    return Preprocessing(DINOV2_SIZE, scale, config.interpolation, config.mean, config.std)


def _unloadable(model: str, checkpoint: str, error: Exception) -> str:
    if given(checkpoint):
        return f"{checkpoint} does not fit timm's {model!r}: {brief(error)}"
    return (
        f"timm's weights of {model!r} cannot be fetched ({brief(error)}): without a network, fetch "
        f"model.safetensors of timm/{model} from the Hugging Face hub elsewhere, and name the file "
        "in `checkpoint`"
    )


class ClipTower:
    """An open_clip model's image features, (N, D), not normalised, as CLIP-FID takes them.

    Args:
        model: an open_clip name or a directory in its layout; empty is `CLIP`.
        checkpoint: a pretrained tag or a file, for a name; empty or "published" is `CLIP_TAG` for
            the default model.

    Raises:
        CheckpointError: unknown name, no such file, no network, or weights that do not fit.
    """

    def __init__(self, model: str, checkpoint: str, device: str) -> None:
        pretrained = checkpoint if given(checkpoint) else "" if model else CLIP_TAG
        loaded = TextImageModel(model or CLIP, pretrained, device)
        self.network: Any = loaded.model
        self.visual: nn.Module = loaded.model.visual
        self._transform: Callable[[Any], Tensor] = loaded.transform()
        self._settings: Mapping[str, Any] = loaded.model.visual.preprocess_cfg

    @property
    def fingerprint(self) -> str:
        """Of the preprocessing."""
        text = json.dumps(dict(self._settings), sort_keys=True, default=list)
        return f"transform:{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def preprocess(self, images: np.ndarray) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, 3, S, S) fp32, by the model's own transform."""
        return torch.stack([self._transform(Image.fromarray(image)) for image in images])

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.network.encode_image(pixels)
