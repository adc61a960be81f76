"""Policies and tokenizers from files: configuration, construction, strict loading."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from actors.models.llamagen import LlamaGen, LlamaGenConfig
from actors.models.vq import VQConfig, VQDecoder, VQTokenizer
from cluster.errors import CheckpointError
from cluster.tensors import load_strict, read_config, read_tensors

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The policy to tune."""

    checkpoint: str = "package://learner.miniature/networks/policy.safetensors"
    """Safetensors file whose header carries the architecture."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The VQ tokenizer that turns tokens into pixels."""

    checkpoint: str = "package://learner.miniature/networks/tokenizer.safetensors"
    """Safetensors file whose header carries the architecture."""


def load_policy(config: PolicyConfig, *, weights: bool = True, device: str = "cpu") -> LlamaGen:
    """Build the policy of a checkpoint, in eval mode.

    Args:
        weights: False builds the architecture only (a sampler gets its weights from the learner).

    Raises:
        CheckpointError: file missing, truncated, of another family, or not an exact fit.
    """
    architecture = _architecture(config.checkpoint, "llamagen", LlamaGenConfig)
    with torch.device("cpu"):
        policy = LlamaGen(architecture)
    if weights:
        load_strict(policy, read_tensors(config.checkpoint), config.checkpoint)
    return policy.to(device).eval().requires_grad_(False)


def load_decoder(config: TokenizerConfig, *, device: str = "cpu") -> VQDecoder:
    """Build the decoding half of a tokenizer and load its weights, in eval mode."""
    return _load_tokenizer(VQDecoder, config, device)


def load_tokenizer(config: TokenizerConfig, *, device: str = "cpu") -> VQTokenizer:
    """The whole tokenizer, encoder included."""
    return _load_tokenizer(VQTokenizer, config, device)


V = TypeVar("V", bound=VQDecoder)


def _load_tokenizer(kind: type[V], config: TokenizerConfig, device: str) -> V:
    module = kind(_architecture(config.checkpoint, "llamagen-vq", VQConfig))
    tensors = read_tensors(config.checkpoint)
    load_strict(module, tensors, config.checkpoint, ignore=kind.UNUSED)
    return module.to(device).eval().requires_grad_(False)


def _architecture(path: str, family: str, kind: type[T]) -> T:
    config = read_config(path)
    found = config.pop("family", None)
    if found != family:
        raise CheckpointError(f"{path} holds a {found!r}, expected a {family!r}")
    return kind(**{name: _hashable(value) for name, value in _known(path, config, kind).items()})


def _known(path: str, config: dict[str, Any], kind: type) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    unknown = config.keys() - names
    if unknown:
        raise CheckpointError(
            f"{path}: architecture field {sorted(unknown)[0]!r} is unknown to {kind.__name__}; "
            "was the file written by a newer version?"
        )
    return config


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
