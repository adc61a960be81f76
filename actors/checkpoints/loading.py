"""Policies and tokenizers: configuration, construction, strict loading.

Kinds of checkpoints and their architectures: `actors.checkpoints.sources`. Weights are allocated
once, on the target device in the target dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from actors.checkpoints.families import Kind
from actors.checkpoints.sources import (
    Source,
    official_tensors,
    policy_architecture,
    tokenizer_architecture,
)
from actors.checkpoints.zoo import candidates, family_of
from actors.models.base import Architecture, PolicyArchitecture, PolicyModule
from actors.models.vq import VQConfig, VQDecoder, VQTokenizer
from cluster.errors import CheckpointError
from cluster.model_files.tensors import load_strict, read_shapes, read_tensors

M = TypeVar("M", bound=nn.Module)
V = TypeVar("V", bound=VQDecoder)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """A checkpoint of a policy or a tokenizer."""

    checkpoint: str
    """Safetensors file of this program, official checkpoint (torch.save's, safetensors, or the
    directory of its shards), or the name of a fetched model (`python -m actors.weights list`)."""
    architecture: str = ""
    """Architecture of an official file: name of a model, taming's *-project.yaml, or a .json of the
    fields."""
    ema: bool = False
    """Take the moving average of the weights from an official trainer's file."""

    def __post_init__(self) -> None:
        self.source()  # refuses an unknown name

    def source(self) -> Source:
        return Source.of(self.checkpoint, self.architecture, self.ema)


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(CheckpointConfig):
    """The policy to tune."""

    checkpoint: str = "package://learner.miniature/networks/policy.safetensors"


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(CheckpointConfig):
    """The VQ tokenizer that turns tokens into pixels."""

    checkpoint: str = "package://learner.miniature/networks/tokenizer.safetensors"


def load_policy(
    config: PolicyConfig,
    *,
    weights: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PolicyModule:
    """Build the policy of a checkpoint, in eval mode, without gradients.

    Args:
        weights: False builds the architecture only, with zeros (a sampler gets its weights from
            the learner); an official file is then not even opened.
        dtype: of the weights, whatever the file's. Tables such as RoPE's keep their own.

    Raises:
        CheckpointError: file missing, damaged, of another family, or not an exact fit.
        ConfigError: the checkpoint or its architecture is not known.
    """
    source = config.source()
    architecture = policy_architecture(source)
    if weights:
        policy = _checked_module(init_policy, architecture, source)
        _fill(_materialise(policy, device, dtype, torch.empty), source, architecture)
    else:
        policy = build_policy(architecture, device=device, dtype=dtype)
    return policy.eval().requires_grad_(False)


def load_decoder(
    config: TokenizerConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VQDecoder:
    """Build the decoding half of a tokenizer and load its weights, in eval mode; for `dtype` see
    `VQDecoder.decode_in`."""
    decoder = _load_tokenizer(VQDecoder, config, device)
    decoder.decode_in(dtype)
    return decoder


def load_tokenizer(config: TokenizerConfig, *, device: str | torch.device = "cpu") -> VQTokenizer:
    """The whole tokenizer, encoder included."""
    return _load_tokenizer(VQTokenizer, config, device)


def _load_tokenizer(kind: type[V], config: TokenizerConfig, device: str | torch.device) -> V:
    source = config.source()
    architecture = tokenizer_architecture(source)
    module = _checked_module(kind, architecture, source)
    _materialise(module, device, torch.float32, torch.empty)
    _fill(module, source, architecture, ignore=kind.UNUSED)
    return module.eval().requires_grad_(False)


def build_policy(
    architecture: PolicyArchitecture,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PolicyModule:
    """A policy with zero weights, to be loaded later: until then it draws uniform noise, not NaN.
    Buffers that no file holds (RoPE's tables, token orders) have their values."""
    with _MetaWeights():
        policy = init_policy(architecture)
    return _materialise(policy, device, dtype, torch.zeros)


def init_policy(architecture: PolicyArchitecture) -> PolicyModule:
    """The module of an architecture, freshly initialised."""
    return family_of(architecture).module(architecture)


def weightless_policy(architecture: PolicyArchitecture) -> PolicyModule:
    """A policy whose weights are on the meta device, and whose tables (token orders) are real: for
    `Policy.codes`, which reads no weights."""
    with _MetaWeights():
        return init_policy(architecture).eval()


def check_fit(tensors: Mapping[str, Tensor], architecture: Architecture, source: Source) -> None:
    """Compare names and shapes with an architecture, on the meta device.

    Raises:
        CheckpointError: names the first tensor that is missing, unexpected or of another shape.
    """
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    module = _on_meta(architecture).to("meta")
    _load(module, shapes, source, getattr(module, "UNUSED", ()))


@functools.lru_cache(maxsize=64)
def count_parameters(architecture: Architecture) -> int:
    """Parameters of a policy or of a whole tokenizer."""
    return sum(parameter.numel() for parameter in _on_meta(architecture).parameters())


def _checked_module(make: Callable[[Any], M], architecture: Architecture, source: Source) -> M:
    """A module on the meta device, after its names and shapes were compared with the file's.

    Raises:
        CheckpointError: they differ, or the architecture is impossible.
    """
    try:
        with _MetaWeights():
            module = make(architecture)
            empty = make(architecture).to("meta")
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
        raise CheckpointError(
            f"{source.architecture or source.file}: no network can be made of this architecture "
            f"({error})"
        ) from error
    _load(empty, file_shapes(source, architecture), source, getattr(module, "UNUSED", ()))
    return module


def file_shapes(source: Source, architecture: Architecture) -> dict[str, Tensor]:
    """A source's tensors on the meta device; reads no weights and verifies no checksums.

    Raises:
        CheckpointError: see `official_tensors`, `read_shapes`.
    """
    if not source.official:
        return read_shapes(source.file)
    tensors = official_tensors(source, architecture, check=False)
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}


def _on_meta(architecture: Architecture) -> nn.Module:
    if not isinstance(architecture, VQConfig):
        return weightless_policy(architecture)
    with _MetaWeights():
        return VQTokenizer(architecture)


def _fill(
    module: nn.Module, source: Source, architecture: Architecture, ignore: Collection[str] = ()
) -> None:
    if source.official:
        _load(module, official_tensors(source, architecture), source, ignore)
    else:
        _load(module, read_tensors(source.file), source, ignore)


def _load(
    module: nn.Module, tensors: Mapping[str, Tensor], source: Source, ignore: Collection[str]
) -> None:
    try:
        load_strict(module, tensors, source.file, ignore=ignore)
    except CheckpointError as error:
        kind: Kind = "tokenizer" if isinstance(module, VQDecoder) else "policy"
        names = candidates(tensors, kind) if source.official else []
        if not names or source.architecture in names:
            raise
        raise CheckpointError(
            f"{error} Architecture is {source.architecture}; the file's width, depth and "
            f"vocabulary are those of {', '.join(names)}"
        ) from None


class _MetaWeights(TorchFunctionMode):
    """Modules built inside have their weights on the meta device. Only `torch.empty`, which layers
    allocate weights with, is redirected; computed buffers (RoPE's tables) are real."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _materialise(
    module: M, device: str | torch.device, dtype: torch.dtype, make: Callable[..., Tensor]
) -> M:
    """Allocate meta weights with `make`. Tensors of the state dict get `dtype`; other buffers keep
    theirs."""
    persistent = module.state_dict().keys()

    def real(name: str, tensor: Tensor) -> Tensor:
        wanted = dtype if name in persistent and tensor.is_floating_point() else tensor.dtype
        if tensor.is_meta:
            return make(tensor.shape, device=device, dtype=wanted)
        return tensor.detach().to(device, wanted)

    for prefix, part in module.named_modules():
        place = f"{prefix}." if prefix else ""
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(real(place + name, parameter))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = real(place + name, buffer)
    return module
