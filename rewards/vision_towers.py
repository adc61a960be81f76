"""DINOv2 and CLIP as feature spaces: a second opinion beside Inception's.

Shapes: N images, S the side the network takes, D feature dimensions.
"""

from __future__ import annotations

import difflib
import math
from typing import Any

import torch
from torch import Tensor, nn

from cluster.checkpoint_files import read_checkpoint
from cluster.errors import CheckpointError, ConfigError
from cluster.torchvision_ops import ensure_torchvision
from cluster.weight_checks import check_finite
from rewards.openclip import TextImageModel
from rewards.pixels import SUPPORT, Preprocess, ResizeMode
from rewards.weight_files import brief, given, weights_digest

DINOV2 = "vit_large_patch14_dinov2.lvd142m"
DINOV2_SIZE = 224  # pixels a side, as in Stein et al. 2023; the weights were made with 518
CLIP = "ViT-B-32-quickgelu"  # CLIP-FID's (Kynkäänniemi et al. 2023, 2203.06026), with these weights
CLIP_TAG = "openai"


def load_dinov2(model: str = "", checkpoint: str = "") -> tuple[nn.Module, Preprocess, str]:
    """A vision transformer of timm whose output is its features, (N, D), on the CPU.

    DINOv2's (Oquab et al. 2023, 2304.07193) are the class token after the last norm. Position
    embeddings made for another image size are resampled once, by timm (bicubic, antialiased); the
    authors' own code resamples a little differently, so that features agree to some digits only.

    Args:
        model: a timm name; empty is `DINOV2`.
        checkpoint: .safetensors or .pth, of timm or of DINOv2's authors; empty or "published"
            fetches timm's.

    Returns:
        The network, what it takes, and the weights' digest: before resampling, whose last bits
        may differ between machines.

    Raises:
        ConfigError: no vision transformer of that name, or one whose preprocessing is not known.
        CheckpointError: no such file, no network, or the file of another model.
    """
    model = model or DINOV2
    settings = _settings(known_tower(model), model)
    ensure_torchvision()
    import timm

    overlay: dict[str, Any] = {}
    if given(checkpoint):
        overlay = {"state_dict": read_checkpoint(checkpoint)}
    try:
        network: Any = timm.create_model(
            model, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0
        )
    except Exception as error:  # of the hub, of the network, of a misfit: timm passes on any
        raise CheckpointError(_unloadable(model, checkpoint, error)) from error
    check_finite(network.state_dict(), checkpoint if given(checkpoint) else model)
    digest = weights_digest(network)
    network.set_input_size((DINOV2_SIZE, DINOV2_SIZE))
    return network, settings, digest


def known_tower(model: str) -> Any:
    """timm's description of a vision transformer's weights.

    Raises:
        ConfigError: it has none of that name, or none of that tag.
    """
    ensure_torchvision()
    import timm
    from timm.models import is_model_in_modules

    name = model.partition(".")[0]
    if not is_model_in_modules(name, {"vision_transformer"}):
        close = difflib.get_close_matches(name, timm.list_models(module="vision_transformer"))
        raise ConfigError(
            f"model: {model!r} is none of timm's vision transformers; close are "
            f"{', '.join(close) or 'none'}"
        )
    try:
        return timm.get_pretrained_cfg(model)
    except RuntimeError as error:  # a tag, after the dot, that is not there
        tags = ", ".join(timm.list_models(f"{name}.*", pretrained=True)) or "none"
        raise ConfigError(f"model: {model!r}: {brief(error)}; timm has {tags}") from error


def tower_dim(model: str) -> int:
    """D of a vision transformer of timm; no weights are loaded.

    Raises:
        ConfigError: it has none of that name.
    """
    known_tower(model)
    import timm

    with torch.device("meta"):
        network: Any = timm.create_model(model, pretrained=False, num_classes=0)
    return int(network.num_features)


def _settings(config: Any, model: str) -> Preprocess:
    """From timm's description of a model."""
    if config is None:
        raise ConfigError(f"model: timm has no weights of {model!r}: choose one that it lists")
    ways: dict[str, ResizeMode] = {"center": "shortest", "squash": "squash"}
    if config.interpolation not in SUPPORT or config.crop_mode not in ways:
        raise ConfigError(
            f"model: {model!r} takes images resized by {config.interpolation!r}, "
            f"{config.crop_mode!r}; known here are {' and '.join(SUPPORT)}, {' and '.join(ways)}: "
            "choose another model"
        )
    return Preprocess(
        size=(DINOV2_SIZE, DINOV2_SIZE),
        scale=math.floor(DINOV2_SIZE / config.crop_pct),
        resize_mode=ways[config.crop_mode],
        interpolation=config.interpolation,
        mean=tuple(config.mean),
        std=tuple(config.std),
    )


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
        try:
            loaded = TextImageModel(model or CLIP, pretrained, device, pack=False)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; for features, the tag or file goes into `checkpoint`: without a network "
                "a file that was fetched elsewhere"
            ) from error
        self.network: Any = loaded.model
        self.visual: nn.Module = loaded.model.visual
        self.settings = Preprocess.of(loaded.preprocess_config)

    def __call__(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) fp32 -> (N, D)."""
        return self.network.encode_image(pixels)
