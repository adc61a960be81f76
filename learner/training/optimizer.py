"""AdamW with a learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from cluster.bounds import check_at_most
from cluster.errors import CheckpointError
from cluster.roles import Resources
from learner.training.data_parallel import DataParallelGroup
from learner.training.lora import LoraConfig


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Resources):
    """AdamW, its schedule, precision and memory, and the learner's resources."""

    lr: Annotated[float, Field(le=10)] = 1e-5
    """Peak learning rate, > 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's averages of the gradient and of its square, in [0, 1)."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, >= 0."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradient; longer gradients are scaled down to it."""
    warmup: int = 0
    """Iterations in which the learning rate rises linearly to its peak."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate falls from decay_from on; constant: not at all."""
    decay_from: float = 0.5
    """Share of the iterations after which the learning rate falls, in [0, 1]."""
    final_lr: float = 0.05
    """Learning rate at the end, as a share of the peak, in [0, 1]."""
    updates_per_iteration: int = 1
    """Passes over an iteration's rollouts, each with its own optimizer steps."""
    minibatches: int = 1
    """Minibatches of each pass, one optimizer step each."""
    microbatch: int = 32
    """Most rollouts in one forward pass; gradients accumulate over the batch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward and backward passes; bf16 is autocast. Weights, gradients and
    optimizer are fp32 either way."""
    checkpointing: bool = False
    """Activation checkpointing: recompute activations in the backward pass."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Compile the policy's transformer blocks with torch.compile. auto: on a GPU. Compiles
    when rows, gradients or adapters are first seen, mostly in the first step; if it fails, one
    warning says so, and the blocks run without it."""
    reference_device: Literal["learner", "cpu"] = "learner"
    """Where the frozen reference is kept between its passes. With LoRA there is no copy: the
    reference is the policy without its adapters."""
    adamw: Literal["auto", "fused", "foreach", "plain"] = "auto"
    """Implementation of AdamW in PyTorch. auto: fused on a GPU, plain on a CPU."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        Resources.__post_init__(self)
        if not (self.lr > 0 and self.max_grad_norm > 0):
            raise ValueError("lr and max_grad_norm must be > 0")
        check_at_most(self, max_grad_norm=1e9, weight_decay=1e6, warmup=1 << 30)
        if not (all(0 <= beta < 1 for beta in self.betas) and self.weight_decay >= 0):
            raise ValueError(
                f"betas must be in [0, 1) and weight_decay >= 0, found {self.betas} and "
                f"{self.weight_decay}"
            )
        if not (0 <= self.decay_from <= 1 and 0 <= self.final_lr <= 1):
            raise ValueError("decay_from and final_lr are shares, in [0, 1]")
        if self.warmup < 0:
            raise ValueError(f"warmup must be >= 0, found {self.warmup}")
        for name in ("microbatch", "updates_per_iteration", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, found {getattr(self, name)}")

    def lr_at(self, iteration: int, iterations: int) -> float:
        """Learning rate of an iteration: warm-up, constant, then falling to final_lr."""
        return self._falling(iteration / max(iterations - 1, 1)) * self._rising(iteration)

    def _rising(self, iteration: int) -> float:
        return min((iteration + 1) / self.warmup, 1.0) if self.warmup else 1.0

    def _falling(self, progress: float) -> float:
        if self.schedule == "constant" or progress <= self.decay_from or self.decay_from == 1:
            return self.lr
        fallen = (progress - self.decay_from) / (1 - self.decay_from)
        if self.schedule == "cosine":
            fallen = (1 - math.cos(math.pi * fallen)) / 2
        return self.lr * (1 - (1 - self.final_lr) * fallen)


STEP = "step"
STATE = (STEP, "exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter."""


class PolicyAdamW:
    """AdamW over the trainable parameters of a policy. Its state is sharded as they are.

    Not torch's `get_optimizer_state_dict`: it renames the state, adds parameter groups, and does
    not say which tensor of a damaged file does not fit.
    """

    def __init__(
        self, policy: nn.Module, config: OptimizerConfig, dp_group: DataParallelGroup
    ) -> None:
        self._named = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self._limit, self._dp_group = config.max_grad_norm, dp_group
        self._adamw = torch.optim.AdamW(
            self._named.values(),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            **_implementation(config),
        )

    def zero_grad(self) -> None:
        self._adamw.zero_grad()

    def limit(self) -> Tensor:
        """Clip the gradient's norm; returns the norm before, on the device."""
        norm = torch.nn.utils.clip_grad_norm_(self._named.values(), self._limit)
        return norm if self._dp_group.size == 1 else cast(Any, norm).full_tensor()

    def step(self, lr: float) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()

    def tensors(self) -> dict[str, Tensor]:
        """The full state, as state/parameter -> tensor; see `DataParallelGroup.gather`."""
        kept = {
            f"{key}/{name}": tensor
            for name, parameter in self._named.items()
            for key, tensor in self._adamw.state.get(parameter, {}).items()
        }
        return self._dp_group.gather(kept)

    def load(self, tensors: dict[str, Tensor], source: str) -> None:
        """Inverse of `tensors`, for any number of learners.

        Raises:
            CheckpointError: a tensor belongs to no parameter, or a parameter has a part only.
        """
        fused = self._adamw.param_groups[0]["fused"]
        state: dict[Tensor, dict[str, Tensor]] = {}
        for full, tensor in tensors.items():
            key, _, name = full.partition("/")
            parameter = self._named.get(name)
            if (
                parameter is None
                or key not in STATE
                or not tensor.is_floating_point()
                or tensor.shape != (() if key == STEP else parameter.shape)
            ):
                raise CheckpointError(f"{source}: optimizer state {full!r} fits no parameter")
            tensor = tensor.to(parameter.device if tensor.ndim or fused else "cpu")
            part = self._dp_group.local_shard(tensor, parameter)
            state.setdefault(parameter, {})[key] = part
        for parts in state.values():
            if len(parts) < len(STATE):
                raise CheckpointError(
                    f"{source}: a parameter has {', '.join(parts)}, expected {', '.join(STATE)}"
                )
        self._adamw.state.clear()  # of later updates, after a rollback
        self._adamw.state.update(state)


def _implementation(config: OptimizerConfig) -> dict[str, bool]:
    if config.adamw == "auto":
        return {"fused": True} if config.device == "cuda" else {"foreach": False}
    return {} if config.adamw == "plain" else {config.adamw: True}
