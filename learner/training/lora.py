"""LoRA through `peft` (Hu et al. 2021, 2106.09685): low-rank adapters beside frozen weights.

Samplers get the frozen weights once, then each version's adapters, and compute
W + (alpha / rank) B A. Checkpoints hold the merged weights and, to resume from, the adapters.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cluster.bounds import check_at_most
from cluster.errors import CheckpointError, ConfigError
from cluster.model_files.torchvision_ops import ensure_torchvision
from cluster.model_files.weight_checks import check_finite

ADAPTER = "default"
MARK = "lora_"
BASE = ".base_layer"


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Train low-rank adapters only; needs `pip install tessera-rl[lora]`."""

    rank: int = 0
    """Rank of the adapters; 0 trains every weight."""
    alpha: int = 0
    """Alpha of the adapters, which are scaled by alpha / rank; 0 is twice the rank."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers with adapters, e.g. wqkv; empty: all of every block."""

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha < 0:
            raise ValueError(
                f"rank and alpha of lora must be >= 0, found {self.rank} and {self.alpha}"
            )
        check_at_most(self, rank=1 << 16, alpha=1 << 20)
        if self.rank and importlib.util.find_spec("peft") is None:
            raise ConfigError("lora needs peft: pip install 'tessera-rl[lora]'")


class Adapters:
    """The adapters of a policy, whose other weights are frozen.

    Raises:
        ConfigError: no layer has one of the target names.
    """

    def __init__(self, policy: nn.Module, config: LoraConfig, seed: int = 0) -> None:
        ensure_torchvision()  # peft imports transformers, and that torchvision
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model

        targets = list(config.targets) or _linear_layers(policy)
        alpha = config.alpha or 2 * config.rank
        wanted = PeftConfig(r=config.rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0)
        policy.requires_grad_(False)
        with torch.random.fork_rng():  # equal in every learner
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(wanted, policy)
            except ValueError as error:
                raise ConfigError(f"learner.lora.targets {targets}: {error}") from error
        self._policy = policy
        self._layers: list[Any] = [m for m in policy.modules() if hasattr(m, "lora_A")]
        policy.eval()

    @contextmanager
    def off(self) -> Iterator[None]:
        """The policy without its adapters: the frozen reference."""
        for layer in self._layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(True)

    @torch.no_grad()
    def plain(self, *, merged: bool = True) -> dict[str, Tensor]:
        """State dict of the plain policy, adapters merged in or left out."""
        layers = dict(self._policy.named_modules())
        plain: dict[str, Tensor] = {}
        for name, tensor in self._policy.state_dict().items():
            if MARK in name:
                continue
            owner, _, leaf = name.rpartition(".")
            if merged and owner.endswith(BASE) and leaf == "weight":
                layer: Any = layers[owner.removesuffix(BASE)]
                tensor = tensor + layer.get_delta_weight(ADAPTER).to(tensor)
            plain[name.replace(BASE, "")] = tensor
        return plain

    @torch.no_grad()
    def pairs(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        """Name of a weight W -> A, B, scale; with its adapter it is W + scale B A."""
        return {
            f"{name}.weight": (
                layer.lora_A[ADAPTER].weight,
                layer.lora_B[ADAPTER].weight,
                layer.scaling[ADAPTER],
            )
            for name, layer in self._policy.named_modules()
            if hasattr(layer, "lora_A")
        }

    def tensors(self) -> dict[str, Tensor]:
        """The adapters' tensors."""
        return {n: t for n, t in self._policy.state_dict().items() if MARK in n}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], source: str) -> None:
        """Inverse of `tensors`.

        Raises:
            CheckpointError: they are of other layers, of another rank, or not finite.
        """
        own = self.tensors()
        for name in own.keys() | tensors.keys():
            if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
                raise CheckpointError(f"{source}: adapter {name!r} does not fit this run's lora")
        check_finite(tensors, source)
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _linear_layers(policy: nn.Module) -> list[str]:
    """Last parts of the names of linear layers inside numbered blocks."""
    names = {
        name.rpartition(".")[2] if not name.rpartition(".")[2].isdigit() else name
        for name, module in policy.named_modules()
        if isinstance(module, nn.Linear) and any(part.isdigit() for part in name.split("."))
    }
    return sorted(names)
