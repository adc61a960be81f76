"""Settings of CLIP weights, from open_clip's tags and the JSON configurations beside files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError

DIRECTORY_CONFIG = "open_clip_config.json"
PREPROCESSOR, TRANSFORMERS = "preprocessor_config.json", "config.json"
"""Configurations of transformers."""
BICUBIC, BILINEAR = 3, 2  # PIL's numbers, as transformers writes them
WAYS = {
    "interpolation": ("bicubic", "bilinear", "random"),
    "resize_mode": ("shortest", "longest", "squash"),
    "mode": ("RGB",),
}
DEFAULTS = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}
"""open_clip's defaults; its import takes seconds. A test compares them."""
LARGEST_STD = 2.0  # of pixels in [0, 1]
LARGEST = 1 << 20  # of a side, width, vocabulary or number of layers; above, a file is damaged


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Transform and activation of weights."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    resize_mode: str
    fill_color: int
    quick_gelu: bool
    """QuickGELU, OpenAI's sigmoid approximation, and not GELU."""

    @property
    def preprocess(self) -> dict[str, Any]:
        """open_clip's description, without the size."""
        fields = asdict(self)
        del fields["quick_gelu"]
        return fields

    def __str__(self) -> str:
        mean, std = (",".join(f"{value:.3g}" for value in part) for part in (self.mean, self.std))
        activation = "QuickGELU" if self.quick_gelu else "GELU"
        return f"{activation}, {self.interpolation}, {self.resize_mode}, mean {mean}, std {std}"


def settings_of(preprocess: Mapping[str, Any], quick_gelu: bool) -> Settings:
    """Settings of a tag or `preprocess_cfg`; missing ones are open_clip's defaults."""
    named = {name: preprocess[name] for name in DEFAULTS if preprocess.get(name) is not None}
    merged = {**DEFAULTS, **named}
    return Settings(
        mean=_triple(merged["mean"]),
        std=_triple(merged["std"]),
        interpolation=merged["interpolation"],
        resize_mode=merged["resize_mode"],
        fill_color=merged["fill_color"],
        quick_gelu=quick_gelu,
    )


def read_directory(directory: Path) -> dict[str, Any]:
    """The `open_clip_config.json` of a directory, checked.

    Raises:
        CheckpointError: missing or invalid.
    """
    file = directory / DIRECTORY_CONFIG
    found = _json(file, "a directory in open_clip's layout, with")
    try:
        model, preprocess = found["model_cfg"], found.get("preprocess_cfg") or {}
        if not isinstance(model, Mapping) or not isinstance(preprocess, Mapping):
            raise TypeError("model_cfg and preprocess_cfg must be objects")
        for part in ("vision_cfg", "text_cfg"):
            if not isinstance(model[part], Mapping):
                raise TypeError(f"{part} must be an object")
            _check_sizes(part, model[part])
        _check_sizes("model_cfg", {"embed_dim": model["embed_dim"]})
        if not isinstance(model.get("quick_gelu", False), bool):
            raise TypeError(f"quick_gelu must be true or false, found {model['quick_gelu']!r}")
        _check_preprocess(preprocess)
    except (KeyError, TypeError, ValueError) as error:
        what = f"without {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{directory}: expected a directory in open_clip's layout, found a {DIRECTORY_CONFIG} "
            f"that is none ({what}): fetch it again"
        ) from error
    return found


def directory_settings(config: Mapping[str, Any]) -> Settings:
    """Settings in an `open_clip_config.json`."""
    quick_gelu = bool(config["model_cfg"].get("quick_gelu", False))
    return settings_of(config.get("preprocess_cfg") or {}, quick_gelu)


def transformers_settings(directory: Path, quick_gelu: bool) -> Settings | None:
    """Settings in transformers' configurations of a directory; None without any.

    Args:
        quick_gelu: the activation if no `config.json` names one.

    Raises:
        CheckpointError: a transform that open_clip does not have.
    """
    file = directory / PREPROCESSOR
    if not file.is_file():
        return None
    found = _json(file, "a configuration of transformers, ")
    try:
        preprocess = _from_transformers(found)
        _check_preprocess(preprocess)
        activation = _activation(directory)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: expected the transform of a CLIP model ({type(error).__name__}: {error}): "
            "set tag to the pretrained tag of open_clip that the weights are of"
        ) from error
    return settings_of(preprocess, quick_gelu if activation is None else activation)


def _from_transformers(found: Mapping[str, Any]) -> dict[str, Any]:
    """A `preprocess_cfg` of open_clip from transformers' CLIPImageProcessor or SiglipImageProcessor
    (which squashes)."""
    filters = {BICUBIC: "bicubic", BILINEAR: "bilinear"}
    size = found["size"]
    shortest = isinstance(size, int) or "shortest_edge" in size
    if shortest != bool(found.get("do_center_crop", False)) or found.get("do_pad"):
        raise ValueError("neither the shorter side and a centre crop, nor both sides")
    return {
        "mean": found["image_mean"],
        "std": found["image_std"],
        "interpolation": filters[found["resample"]],
        "resize_mode": "shortest" if shortest else "squash",
    }


def _activation(directory: Path) -> bool | None:
    """Whether transformers' `config.json` names QuickGELU; None if it names no activation."""
    file = directory / TRANSFORMERS
    if not file.is_file():
        return None
    towers = _json(file, "a configuration of transformers, ")
    named = {
        str(towers[part]["hidden_act"])
        for part in ("vision_config", "text_config")
        if "hidden_act" in (towers.get(part) or {})
    }
    if len(named) > 1:
        raise ValueError(f"{file.name} names two activations, {' and '.join(sorted(named))}")
    return named == {"quick_gelu"} if named else None


def _json(file: Path, expected: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"a {type(found).__name__} instead of an object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{file.parent}: expected {expected} {file.name}, found none that can be read "
            f"({type(error).__name__}: {error})"
        ) from error
    return found


def _check_sizes(where: str, sizes: Mapping[str, Any]) -> None:
    """Check every integer, also in lists, against `LARGEST`."""
    for name, value in sizes.items():
        parts = value if isinstance(value, list) else [value]
        for part in parts:
            if isinstance(part, int) and not isinstance(part, bool) and not 0 <= part <= LARGEST:
                raise ValueError(f"{where}: {name} is {part}")


def _check_preprocess(config: Mapping[str, Any]) -> None:
    known = {"size", "mean", "std", "fill_color", *WAYS}
    if unknown := sorted(set(config) - known):
        raise ValueError(f"preprocess_cfg has {', '.join(unknown)}, which open_clip does not know")
    if not all(0 <= value <= 1 for value in _triple(config.get("mean", 0))):
        raise ValueError(f"mean must be of pixels in [0, 1], found {config['mean']!r}")
    if not all(1e-6 < value <= LARGEST_STD for value in _triple(config.get("std", 1))):
        raise ValueError(f"std must be of pixels in [0, 1], found {config['std']!r}")
    for name, ways in WAYS.items():
        if name in config and config[name] not in ways:
            raise ValueError(f"{name} must be one of {', '.join(ways)}, found {config[name]!r}")
    fill = config.get("fill_color", 0)
    if not isinstance(fill, int) or not 0 <= fill <= 255:
        raise ValueError(f"fill_color must be 0 to 255, found {fill!r}")


def _triple(values: Any) -> tuple[float, ...]:
    """A number for each of three channels."""
    given = [values] * 3 if isinstance(values, int | float) else values
    numbers = tuple(float(value) for value in given)
    if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)):
        raise ValueError(f"expected three finite numbers, found {values!r}")
    return numbers if len(numbers) == 3 else numbers * 3
