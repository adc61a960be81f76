"""DINOv2 and CLIP as feature spaces.

Shapes: N images, S the side the network takes, D feature dimensions.
"""

from __future__ import annotations

import difflib
import json
import math
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import CheckpointError, ConfigError
from cluster.model_files.checkpoints import read_checkpoint
from cluster.model_files.tensors import locate
from cluster.model_files.torchvision_ops import ensure_torchvision
from cluster.model_files.weight_checks import check_finite
from rewards.networks.open_clip_models import TextImageModel
from rewards.networks.preprocessing import SUPPORT, Preprocess, ResizeMode
from rewards.networks.weight_files import brief, is_user_file, weights_digest

DINOV2 = "vit_large_patch14_dinov2.lvd142m"
DINOV2_SIZE = 224  # pixels a side, as in Stein et al. 2023; the weights were made with 518
QUICK = "quickgelu"  # in timm's names and notes of tags
CLIP = "ViT-B-32-quickgelu"  # CLIP-FID's (Kynkäänniemi et al. 2023, 2203.06026), with these weights
CLIP_TAG = "openai"


def load_dinov2(model: str = "", checkpoint: str = "") -> tuple[nn.Module, Preprocess, str]:
    """A vision transformer of timm whose output is its features, (N, D), on the CPU.

    DINOv2's features (Oquab et al. 2023, 2304.07193) are the class token after the last norm. timm
    resamples position embeddings for another image size (bicubic, antialiased), slightly
    differently from the authors' code.

    Args:
        model: a timm name; empty is `DINOV2`. For a file, with the tag of its weights if timm's
            tags differ in their transform.
        checkpoint: .safetensors or .pth, of timm or of DINOv2's authors; empty or "published"
            fetches timm's.

    Returns:
        The network, its preprocessing, and the digest of the weights before resampling, whose last
        bits may differ between machines.

    Raises:
        ConfigError: no vision transformer of that name, or unknown preprocessing.
        CheckpointError: no such file, not reachable, or the file of another model.
    """
    model, known = known_tower(model or DINOV2, checkpoint)
    settings = _settings(known, model)
    ensure_torchvision()
    import timm

    overlay: dict[str, Any] = {}
    if is_user_file(checkpoint):
        overlay = {"state_dict": read_checkpoint(checkpoint)}
    try:
        network: Any = timm.create_model(
            model, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0
        )
    except Exception as error:  # timm passes on any
        raise CheckpointError(_unloadable(model, checkpoint, error)) from error
    check_finite(network.state_dict(), checkpoint if is_user_file(checkpoint) else model)
    digest = weights_digest(network)
    network.set_input_size((DINOV2_SIZE, DINOV2_SIZE))
    return network, settings, digest


def known_tower(model: str, checkpoint: str = "") -> tuple[str, Any]:
    """The name of a vision transformer, with a tag, and timm's description of its weights.

    For a file, transform and activation come from the tag in the name, from timm's `config.json`
    beside the file, or from all tags if these agree.

    Raises:
        ConfigError: unknown name or tag, tags that differ, or weights of another activation.
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
    tags = timm.list_models(f"{name}.*", pretrained=True)
    if is_user_file(checkpoint) and model == name:
        model = _tag_beside(checkpoint, name, tags) or name
    try:
        known = timm.get_pretrained_cfg(model)
    except RuntimeError as error:  # unknown tag after the dot
        listed = ", ".join(tags) or "none"
        raise ConfigError(f"model: {model!r}: {brief(error)}; timm has {listed}") from error
    if known is None:
        raise ConfigError(f"model: timm has no weights of {model!r}: choose one that it lists")
    if is_user_file(checkpoint) and model == name:
        _check_agreement(name, {tag: timm.get_pretrained_cfg(tag) for tag in tags})
    if _quick_gelu(known) and QUICK not in name:
        tag = f"{name.replace('_clip_', f'_clip_{QUICK}_')}.{known.tag}"
        raise ConfigError(
            f"model: the weights of {model!r} were trained with another activation (QuickGELU), "
            f"and would give other features: set model to {tag}"
        )
    return model, known


def _quick_gelu(config: Any) -> bool:
    return any(QUICK in note for note in getattr(config, "notes", None) or ())


def _tag_beside(checkpoint: str, name: str, tags: list[str]) -> str:
    """The name with the tag of timm's `config.json` beside a file; empty without one."""
    file = locate(checkpoint).parent / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        model = f"{found['architecture']}.{found['pretrained_cfg']['tag']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # none, or not timm's
        return ""
    return model if found["architecture"] == name and model in tags else ""


def _check_agreement(name: str, tags: dict[str, Any]) -> None:
    """
    Raises:
        ConfigError: settings of timm's weights of that name differ.
    """
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for tag, known in tags.items():
        way = (known.interpolation, known.crop_mode, known.crop_pct, known.mean, known.std)
        kinds.setdefault((*way, _quick_gelu(known)), []).append(tag)
    if len(kinds) > 1:
        listed = "; ".join(f"{', '.join(same)}: {kind[:-1]}" for kind, same in kinds.items())
        raise ConfigError(
            f"model: a file of {name!r} does not tell what its weights were trained with, and "
            f"timm's tags differ ({listed}): write the tag that they are of behind the name"
        )


def tower_dim(model: str, checkpoint: str = "") -> int:
    """D of a vision transformer of timm, without loading weights.

    Raises:
        ConfigError: as `known_tower`.
    """
    known_tower(model, checkpoint)
    ensure_torchvision()
    import timm

    with torch.device("meta"):
        network: Any = timm.create_model(model, pretrained=False, num_classes=0)
    return int(network.num_features)


def _settings(config: Any, model: str) -> Preprocess:
    """From timm's description of a model."""
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
    if is_user_file(checkpoint):
        return f"{checkpoint} does not fit timm's {model!r}: {brief(error)}"
    return (
        f"timm's weights of {model!r} cannot be fetched ({brief(error)}): without a network, fetch "
        f"model.safetensors of timm/{model} from the Hugging Face hub elsewhere, and name the file "
        "in `checkpoint`"
    )


def _activation(visual: nn.Module) -> str:
    """Fingerprint of GELU in towers that exist with QuickGELU; empty for QuickGELU (CLIP-FID's),
    as in older references."""
    ensure_torchvision()
    from open_clip.transformer import QuickGELU, VisionTransformer

    quick = any(isinstance(module, QuickGELU) for module in visual.modules())
    return "-gelu" if isinstance(visual, VisionTransformer) and not quick else ""


class ClipTower:
    """An open_clip model's image features, (N, D), not normalised, as in CLIP-FID.

    Args:
        model: an open_clip name or a directory in its layout; empty is `CLIP`.
        checkpoint: a pretrained tag or a file, for a name; empty or "published" is `CLIP_TAG` for
            the default model.
        tag: for a file, the pretrained tag of its weights.

    Raises:
        CheckpointError: unknown name, no such file, not reachable, or weights that do not fit.
    """

    def __init__(self, model: str, checkpoint: str, device: str, tag: str = "") -> None:
        pretrained = checkpoint if is_user_file(checkpoint) else "" if model else CLIP_TAG
        try:
            loaded = TextImageModel(model or CLIP, pretrained, device, tag=tag, pack=False)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; for features, the tag or file goes into `checkpoint`: without a network "
                "a file that was fetched elsewhere"
            ) from error
        self.network: Any = loaded.model
        self.visual: nn.Module = loaded.model.visual
        self.settings = Preprocess.of(loaded.preprocess_config)
        self.fingerprint = self.settings.fingerprint + _activation(loaded.model.visual)

    def __call__(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) fp32 -> (N, D)."""
        return self.network.encode_image(pixels)
