"""Finds an open_clip model's weights, and the transform and activation they were trained with.

A pretrained tag of open_clip sets mean, deviation, interpolation, resizing and activation. For a
file of weights they come from the tag that the user names, from the configuration beside the file,
or from the model's tags if all agree.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError, nearest
from cluster.io.paths import expand_user
from cluster.model_files.tensors import SCHEMES, locate
from cluster.model_files.torchvision_ops import ensure_torchvision
from rewards.networks.open_clip_configs import (
    DIRECTORY_CONFIG,
    Settings,
    directory_settings,
    read_directory,
    settings_of,
    transformers_settings,
)

logger = logging.getLogger(__name__)

LOCAL_DIR = "local-dir:"
HUB = "hf-hub:"
PREFERRED = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
"""Weights that open_clip looks for in a directory, in this order."""
SUFFIXES = (".safetensors", ".bin", ".pth")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "vocab.txt", "vocab.json")
LISTED = 4  # tags of a kind in an error
IRRELEVANT = ("timm_model_pretrained", "hf_model_pretrained", "hf_tokenizer_name")
"""Keys of a `model_cfg` without effect on a model with loaded weights."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model and its weights, found and checked but not loaded."""

    name: str
    """For open_clip: a name, hf-hub:owner/name, or local-dir:directory."""
    tag: str = ""
    """Pretrained tag that open_clip fetches."""
    file: str = ""
    """Checkpoint to load; empty if open_clip fetches the weights."""
    settings: Settings | None = None
    """Settings of that checkpoint; None if open_clip knows them."""
    origin: str = ""
    """Source of the settings, for messages."""
    tokenizer: Mapping[str, Any] | None = None
    """A directory's `text_cfg`; None: open_clip knows the tokenizer by the name."""


def find_source(model: str, pretrained: str, tag: str = "") -> Source:
    """The weights that the options name, with their settings.

    Args:
        model: an open_clip name, "hf-hub:owner/name", or a directory in open_clip's layout.
        pretrained: for a name, a tag or a checkpoint file; empty for the others.
        tag: for a file, the tag of its weights.

    Raises:
        CheckpointError: no weights or two, a damaged configuration, another activation than the
            model's, or a file with unknown settings.
    """
    if has_own_weights(model):
        if pretrained or tag:
            raise CheckpointError(
                f"{model} comes with its own weights, so pretrained and tag must be empty, found "
                f"{pretrained or tag!r}; for other weights set model to an open_clip name"
            )
        directory = directory_of(model)
        return Source(name=model) if directory is None else _of_directory(directory)
    tags = tags_of(model)
    if not pretrained:
        raise CheckpointError(
            f"open_clip model {model!r} needs weights: set pretrained to one of its tags "
            f"({', '.join(tags) or '-'}) or to a checkpoint file"
        )
    if is_file(pretrained):
        return _of_file(model, pretrained, tag)
    if tag:
        raise CheckpointError(
            f"tag says what a checkpoint file was trained with, and pretrained {pretrained!r} is "
            "no file: leave tag empty"
        )
    check_activation(model, pretrained)
    return Source(name=model, tag=pretrained)


def has_own_weights(model: str) -> bool:
    """Whether a model has its own weights: a directory, or a model on the hub."""
    return model.startswith(HUB) or directory_of(model) is not None


def directory_of(model: str) -> Path | None:
    """The directory that a model names, or None.

    Raises:
        CheckpointError: it is missing.
    """
    if model.startswith((*SCHEMES, LOCAL_DIR)):
        return locate(model.removeprefix(LOCAL_DIR), directory=True)
    path = expand_user(model)
    return path if path.is_dir() else None


def is_file(pretrained: str) -> bool:
    """Whether `pretrained` names a file, not a tag."""
    return "/" in pretrained or Path(pretrained).is_file()


def check_names(names: Iterable[str], source: str) -> None:
    """Refuse the names of transformers' CLIPModel and SiglipModel, which open_clip does not read.

    Raises:
        CheckpointError: such names; says which files to take.
    """
    if any(name.startswith(("text_model.", "vision_model.")) for name in names):
        raise CheckpointError(
            f"{source}: its tensors have the names of transformers' models, not open_clip's: take "
            f"{PREFERRED[0]} or {PREFERRED[2]} of the same repository, or name open_clip's tag of "
            "these weights"
        )


def check_activation(model: str, tag: str) -> None:
    """open_clip only warns where weights were trained with QuickGELU and the model has GELU.

    Raises:
        CheckpointError: names the model that has the right activation.
    """
    trained = pretrained_of(model, tag).get("quick_gelu", False)
    if trained and not architecture_of(model).get("quick_gelu", False):
        raise CheckpointError(
            f"open_clip's {tag!r} weights of {model} were trained with another activation "
            f"(QuickGELU), and would score wrongly: set model to {model}-quickgelu"
        )


def architecture_of(model: str) -> dict[str, Any]:
    """open_clip's description of a model of that name; empty if it has none."""
    ensure_torchvision()
    import open_clip

    return open_clip.get_model_config(model) or {}


def tags_of(model: str) -> list[str]:
    """open_clip's pretrained tags of a model."""
    ensure_torchvision()
    import open_clip

    return open_clip.list_pretrained_tags_by_model(model)


def pretrained_of(model: str, tag: str) -> dict[str, Any]:
    """open_clip's description of a tag's weights: source and settings."""
    ensure_torchvision()
    import open_clip

    return open_clip.get_pretrained_cfg(model, tag)


def published_settings(model: str, tag: str) -> Settings:
    """Settings of a tag's weights. A model with QuickGELU keeps it: some tags do not name it."""
    known = pretrained_of(model, tag)
    quick_gelu = known.get("quick_gelu", False) or architecture_of(model).get("quick_gelu", False)
    return settings_of(known, bool(quick_gelu))


def hub_tokenizer_of(source: Source) -> str:
    """Repository of a source's transformers tokenizer; empty if the tokenizer is open_clip's or in
    the source's directory."""
    config = source.tokenizer
    if config is None:
        return str(architecture_of(source.name).get("text_cfg", {}).get("hf_tokenizer_name", ""))
    named = str(config.get("hf_tokenizer_name") or "")
    return "" if named and has_tokenizer(source) else named


def has_tokenizer(source: Source) -> bool:
    """Whether a directory has the files of transformers' tokenizer."""
    directory = Path(source.name.removeprefix(LOCAL_DIR))
    return any((directory / name).is_file() for name in TOKENIZERS)


def _of_directory(directory: Path) -> Source:
    config = read_directory(directory)
    return Source(
        name=f"{LOCAL_DIR}{directory}",
        file=str(_weights_in(directory)),
        settings=directory_settings(config),
        origin=f"of {DIRECTORY_CONFIG}",
        tokenizer=config["model_cfg"]["text_cfg"],
    )


def _weights_in(directory: Path) -> Path:
    """The one file of weights that open_clip would take."""
    for name in PREFERRED:
        if (directory / name).is_file():
            return directory / name
    others = sorted(file for file in directory.iterdir() if file.suffix.lower() in SUFFIXES)
    if len(others) == 1:
        return others[0]
    found = (
        ", ".join(file.name for file in others[:LISTED]) or "none: was the directory copied whole?"
    )
    raise CheckpointError(
        f"{directory}: expected weights ({' or '.join(PREFERRED[:3])}, or a single file of another "
        f"name), found {found}"
    )


def _of_file(model: str, pretrained: str, tag: str) -> Source:
    architecture = architecture_of(model)
    source = Source(name=model, file=pretrained)
    if tag:
        settings = published_settings(model, _known_tag(model, tag))
        return replace(source, settings=settings, origin=f"of the tag {tag}")
    folder = locate(pretrained).parent
    if not architecture:
        return source  # open_clip raises for an unknown model
    if (folder / DIRECTORY_CONFIG).is_file():
        return _as_in_directory(source, folder, architecture)
    plain = bool(architecture.get("quick_gelu", False))
    beside = transformers_settings(folder, plain)
    if beside is not None:
        _keep_activation(model, plain, beside, folder)
        return replace(source, settings=beside, origin=f"of the configuration in {folder}")
    tags = tags_of(model)
    if not tags:  # no published weights: open_clip's training defaults
        origin = f"that open_clip trains with (no weights of {model} are published)"
        return replace(source, settings=settings_of({}, plain), origin=origin)
    kinds = {name: published_settings(model, name) for name in tags}
    if len(set(kinds.values())) > 1:
        raise CheckpointError(_ambiguous(model, pretrained, kinds))
    shown = ", ".join(tags[:LISTED]) + (", ..." if len(tags) > LISTED else "")
    return replace(source, settings=kinds[tags[0]], origin=f"of its published weights ({shown})")


def _as_in_directory(source: Source, folder: Path, architecture: Mapping[str, Any]) -> Source:
    """A file with open_clip's configuration beside it, treated as that directory."""
    config = read_directory(folder)
    described = config["model_cfg"]
    odd = _first_difference(architecture, described)
    if odd:
        raise CheckpointError(
            f"{source.file}: the {DIRECTORY_CONFIG} beside it describes another model than "
            f"{source.name} ({odd}): set model to {folder} and leave pretrained empty, or set tag "
            f"to the pretrained tag of {source.name} that the weights are of"
        )
    settings = directory_settings(config)
    _keep_activation(source.name, architecture.get("quick_gelu", False), settings, folder)
    return replace(
        source,
        name=f"{LOCAL_DIR}{folder}",
        settings=settings,
        origin=f"of the {DIRECTORY_CONFIG} beside the file",
        tokenizer=described["text_cfg"],
    )


def _keep_activation(model: str, quick_gelu: bool, beside: Settings, folder: Path) -> None:
    if quick_gelu and not beside.quick_gelu:
        raise CheckpointError(
            f"{model} has QuickGELU, but the configuration in {folder} says that the weights were "
            f"trained with GELU: set model to {model.removesuffix('-quickgelu')}, or set tag to "
            "the pretrained tag that the weights are of"
        )


def _first_difference(named: Mapping[str, Any], described: Mapping[str, Any], at: str = "") -> str:
    for key in sorted({*named, *described} - {*IRRELEVANT, "quick_gelu"}):
        ours, theirs = named.get(key), described.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            if inside := _first_difference(ours, theirs, f"{at}{key}."):
                return inside
        elif ours != theirs:
            return f"{at}{key} is {theirs!r} there, {ours!r} here"
    return ""


def _known_tag(model: str, tag: str) -> str:
    tags = tags_of(model)
    if not pretrained_of(model, tag):
        close = nearest(tag, tags)
        hint = f"did you mean {close!r}? " if close else ""
        raise CheckpointError(
            f"tag: expected a pretrained tag of {model}, found {tag!r}: {hint}there are "
            f"{', '.join(tags) or 'none'}"
        )
    return tag


def _ambiguous(model: str, pretrained: str, kinds: Mapping[str, Settings]) -> str:
    groups: dict[Settings, list[str]] = {}
    for name, settings in kinds.items():
        groups.setdefault(settings, []).append(name)
    listed = "; ".join(f"{_some(names)}: {settings}" for settings, names in groups.items())
    twin = f"{model}-quickgelu"
    quick = {settings for settings in groups if settings.quick_gelu}
    other = f", or model to {twin} if they have QuickGELU" if quick and tags_of(twin) else ""
    return (
        f"{pretrained}: a file does not tell what its weights were trained with, and open_clip's "
        f"weights of {model} differ in it ({listed}): set tag to the one that they are of, or were "
        f"tuned from{other}"
    )


def _some(names: Sequence[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
