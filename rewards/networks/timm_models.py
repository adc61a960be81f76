"""timm's models by name: their descriptions, preprocessing and weights; image classifiers.

Shapes: N images, S the side the network takes, C classes.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cluster.errors import CheckpointError, ConfigError
from cluster.model_files.checkpoints import read_checkpoint
from cluster.model_files.tensors import locate
from cluster.model_files.torchvision_ops import ensure_torchvision
from cluster.model_files.weight_checks import check_finite
from rewards.networks.preprocessing import SUPPORT, Preprocess, ResizeMode
from rewards.networks.weight_files import brief, is_user_file

QUICK = "quickgelu"  # in timm's names and notes of tags
IMAGENET_CLASSES = 1000


def known_model(model: str, checkpoint: str, kind: str, names: Collection[str]) -> tuple[str, Any]:
    """The name of a timm model, with a tag, and timm's description of its weights.

    For a file, transform and activation come from the tag in the name, from timm's `config.json`
    beside the file, or from all tags if these agree.

    Args:
        kind, names: of the models that are allowed.

    Raises:
        ConfigError: unknown name or tag, tags that differ, or weights of another activation.
    """
    ensure_torchvision()
    import timm

    name = model.partition(".")[0]
    if name not in names:
        close = difflib.get_close_matches(name, names)
        raise ConfigError(
            f"model: {model!r} is none of timm's {kind}; close are {', '.join(close) or 'none'}"
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


def create_model(model: str, checkpoint: str, **options: Any) -> Any:
    """A timm model with the weights of a file, or timm's own, on the CPU.

    Args:
        options: of `timm.create_model`.

    Raises:
        CheckpointError: no such file, not reachable, or the file of another model.
    """
    ensure_torchvision()
    import timm

    overlay: dict[str, Any] = {}
    if is_user_file(checkpoint):
        overlay = {"state_dict": read_checkpoint(checkpoint)}
    try:
        network: Any = timm.create_model(
            model, pretrained=True, pretrained_cfg_overlay=overlay, **options
        )
    except Exception as error:  # timm passes on any
        raise CheckpointError(_unloadable(model, checkpoint, error)) from error
    check_finite(network.state_dict(), checkpoint if is_user_file(checkpoint) else model)
    return network


def known_classifier(model: str, checkpoint: str = "") -> tuple[str, Any]:
    """The name of a classifier of ImageNet's classes, with a tag, and timm's description.

    Raises:
        ConfigError: as `known_model`; or its weights are of other classes.
    """
    ensure_torchvision()
    import timm

    model, known = known_model(model, checkpoint, "models", timm.list_models())
    if known.num_classes != IMAGENET_CLASSES:
        raise ConfigError(
            f"model: the weights of {model!r} know {known.num_classes} classes, expected a "
            f"classifier of ImageNet's {IMAGENET_CLASSES}: choose another tag"
        )
    return model, known


def load_classifier(model: str, checkpoint: str = "") -> tuple[nn.Module, Preprocess]:
    """A classifier of ImageNet's classes, (N, 3, S, S) -> logits (N, 1000), and its preprocessing.

    Args:
        model: a timm name, with the tag of its weights.
        checkpoint: a file in timm's layout; empty or "published" fetches timm's.

    Raises:
        ConfigError: as `known_classifier`, or unknown preprocessing.
        CheckpointError: no such file, not reachable, or the file of another model.
    """
    model, known = known_classifier(model, checkpoint)
    settings = preprocessing_of(known, model, known.input_size[-1])
    return create_model(model, checkpoint), settings


@dataclass(frozen=True)
class Sizes:
    """Sizes of a timm model."""

    parameters: int
    flops: float
    """Of a forward pass of one image; a product and its sum are two."""
    largest: int
    """Numbers of the largest activation of one image."""
    convolutions: bool
    """Most operations are convolutions'."""


@functools.cache
def sizes_of(model: str, **options: Any) -> Sizes:
    """Sizes of a model, counted on a network without memory."""
    ensure_torchvision()
    import timm

    largest = 0

    def see(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output.numel())

    with torch.device("meta"):
        network: Any = timm.create_model(model, pretrained=False, **options).eval()
        image = torch.empty(1, *network.pretrained_cfg["input_size"])
    hooks = [module.register_forward_hook(see) for module in network.modules()]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    parameters = sum(weight.numel() for weight in network.parameters())
    total = float(counter.get_total_flops())
    convolved = counter.get_flop_counts()["Global"].get(torch.ops.aten.convolution, 0)
    return Sizes(parameters, total, largest, convolved > total / 2)


def preprocessing_of(config: Any, model: str, size: int) -> Preprocess:
    """The preprocessing of a model for images of `size` pixels a side, from timm's description.

    Raises:
        ConfigError: one that is not known here.
    """
    ways: dict[str, ResizeMode] = {"center": "shortest", "squash": "squash"}
    if config.interpolation not in SUPPORT or config.crop_mode not in ways:
        raise ConfigError(
            f"model: {model!r} takes images resized by {config.interpolation!r}, "
            f"{config.crop_mode!r}; known here are {' and '.join(SUPPORT)}, {' and '.join(ways)}: "
            "choose another model"
        )
    return Preprocess(
        size=(size, size),
        scale=math.floor(size / config.crop_pct),
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
