"""The families of policies, and all named models."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from actors.checkpoints.families import Family, Kind, NamedModel
from actors.checkpoints.llamagen import LLAMAGEN
from actors.checkpoints.taming import TAMING
from actors.models.base import Architecture
from actors.models.vq import VQConfig
from cluster.errors import ConfigError, did_you_mean

FAMILIES: tuple[Family, ...] = (LLAMAGEN, TAMING)

MODELS: dict[str, NamedModel] = {
    model.name: model
    for kind in ("policy", "tokenizer")
    for family in FAMILIES
    for model in family.models
    if model.kind == kind
}


def family_of(architecture: Architecture) -> Family:
    """The family of a policy or tokenizer."""
    if isinstance(architecture, VQConfig):
        return TAMING if architecture.pixel_rule == "taming" else LLAMAGEN
    return next(family for family in FAMILIES if isinstance(architecture, family.architecture))


def find_model(name: str) -> NamedModel:
    """The model of a name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name not in MODELS:
        # what can be fetched first; file names, too, since these are what the hub shows
        order = sorted(MODELS.values(), key=lambda model: not model.file)
        by_file = {model.file: model.name for model in order if model.file}
        hint = did_you_mean(by_file.get(name, name), [model.name for model in order])
        raise ConfigError(f"no model is named {name!r}: {hint}there are {', '.join(MODELS)}")
    return MODELS[name]


def candidates(tensors: Mapping[str, Tensor], kind: Kind) -> list[str]:
    """Named models with the width, depth and vocabulary of a state dict under our names."""
    table_name, pattern = {
        "policy": ("tok_embeddings.weight", r"layers\.(\d+)\."),
        "tokenizer": ("quantize.embedding.weight", r"decoder\.conv_blocks\.(\d+)\."),
    }[kind]
    if (table := tensors.get(table_name)) is None:
        return []
    depth = len({found[1] for name in tensors if (found := re.match(pattern, name))})
    captions = "cls_embedding.cap_proj.fc1.weight" in tensors
    sizes = (*table.shape, depth, captions)
    return [
        model.name
        for model in MODELS.values()
        if model.kind == kind and model.architecture and _sizes(model.architecture) == sizes
    ]


def _sizes(architecture: Architecture) -> tuple[object, ...]:
    if isinstance(architecture, VQConfig):
        codebook = (architecture.codebook_size, architecture.codebook_dim)
        return (*codebook, len(architecture.multipliers), False)
    table = (architecture.vocab_size, architecture.dim)
    return (*table, architecture.num_layers, architecture.conditioning == "caption")
