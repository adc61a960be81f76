"""AdamW under a schedule, its state divided among the learners of a group (ZeRO stage 1)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from cluster.errors import CheckpointError
from cluster.roles import Resources
from learner.adapters import LoraConfig
from learner.parallel import Peers

CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Resources):
    """AdamW, its schedule, precision and memory, and the learner's resources."""

    lr: float = 1e-5
    """Peak learning rate, > 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's averages of the gradient and of its square, in [0, 1)."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, >= 0."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    warmup: int = 0
    """Iterations in which the learning rate rises linearly to its peak."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate falls from decay_from on; constant does not let it fall."""
    decay_from: float = 0.5
    """Share of the iterations after which the learning rate falls, in [0, 1]."""
    final_lr: float = 0.05
    """Share of the peak learning rate that is left at the end, in [0, 1]."""
    updates_per_iteration: int = 1
    """Passes over an iteration's rollouts, each with its own optimizer steps."""
    minibatches: int = 1
    """Parts into which each pass is cut, one optimizer step each."""
    microbatch: int = 32
    """Most rollouts in one forward pass; gradients accumulate over the batch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the passes. Weights, gradients and optimizer are fp32 either way; with bf16 the passes run
    under autocast."""
    checkpointing: bool = False
    """Compute a layer's activations again in the backward pass rather than keep them."""
    reference_device: Literal["learner", "cpu"] = "learner"
    """Where the frozen reference waits between its passes: beside the policy, or in the CPU's
    memory. With LoRA there is no copy: the reference is the policy without its adapters."""
    adamw: Literal["auto", "fused", "foreach", "plain"] = "auto"
    """PyTorch's implementation. auto: fused on a GPU, plain on a CPU."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        Resources.__post_init__(self)
        if not (self.lr > 0 and self.max_grad_norm > 0):
            raise ValueError("lr and max_grad_norm must be > 0")
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
        """Learning rate of one iteration: warm-up, flat, then falling to final_lr."""
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


def owners(sizes: Iterable[int], learners: int) -> list[int]:
    """Which learner keeps each parameter's optimizer state: largest first, to whoever has least.

    A function of the sizes alone, so every learner comes to the same answer.
    """
    sizes = list(sizes)
    load, owner = [0] * learners, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        owner[index] = min(range(learners), key=lambda rank: (load[rank], rank))
        load[owner[index]] += sizes[index]
    return owner


class ShardedAdamW:
    """AdamW over the trainable parameters of a policy that every learner of a group holds.

    Each learner keeps the state of its own parameters alone: gradients are added up at a
    parameter's owner, which steps it and gives the new value to the others. One learner is
    PyTorch's AdamW and `clip_grad_norm_`, to the bit.
    """

    def __init__(self, policy: nn.Module, config: OptimizerConfig, peers: Peers) -> None:
        self._named = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self._limit, self._peers = config.max_grad_norm, peers
        owner = owners((p.numel() for p in self._named.values()), peers.size)
        self._owner = dict(zip(self._named, owner))
        mine = [p for name, p in self._named.items() if self._owner[name] == peers.rank]
        self._adamw = torch.optim.AdamW(
            [{"params": mine}],
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            **_implementation(config),
        )

    def zero_grad(self) -> None:
        for parameter in self._named.values():
            parameter.grad = None

    def reduce(self) -> float:
        """Add gradients up over the learners, each parameter's at its owner; returns the norm of
        the whole, before it is limited."""
        if self._peers.size == 1:
            return float(torch.nn.utils.clip_grad_norm_(self._named.values(), self._limit))
        for rank, parameters in self._by_owner():
            flat = torch.cat([_gradient(p).reshape(-1) for p in parameters])
            self._peers.reduce_to(flat, rank)
            for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
                mine = rank == self._peers.rank
                parameter.grad = part.view_as(parameter) if mine else None
        gradients = [p.grad for p in self._named.values() if p.grad is not None]
        squares = sum((g.double().square().sum().item() for g in gradients), 0.0)
        norm = math.sqrt(self._peers.sums([squares])[0])
        if norm > self._limit:
            torch._foreach_mul_(gradients, self._limit / (norm + CLIP_EPSILON))
        return norm

    def step(self, lr: float) -> None:
        """Step the own parameters, and exchange the new values."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        if self._peers.size > 1:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for rank, parameters in self._by_owner():
            flat = torch.cat([p.reshape(-1) for p in parameters])
            self._peers.copy_from(flat, rank)
            for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
                parameter.copy_(part.view_as(parameter))

    def _by_owner(self) -> Iterator[tuple[int, list[nn.Parameter]]]:
        for rank in range(self._peers.size):
            theirs = [p for name, p in self._named.items() if self._owner[name] == rank]
            if theirs:
                yield rank, theirs

    def tensors(self) -> dict[str, Tensor]:
        """The whole state under the names of the parameters, on the CPU; every learner of a group
        must call it, and the first one gets the answer (the others an empty one)."""
        found: dict[str, Tensor] = {}
        for name, parameter in self._named.items():
            state = self._adamw.state.get(parameter, {})
            for key, tensor in self._peers.bring_to_first(state, parameter, self._owner[name]):
                found[f"{key}/{name}"] = tensor.cpu()
        return found

    def load(self, tensors: dict[str, Tensor], source: str) -> None:
        """Inverse of `tensors`, whatever number of learners wrote it.

        Raises:
            CheckpointError: a tensor belongs to no parameter.
        """
        for full, tensor in tensors.items():
            key, _, name = full.partition("/")
            parameter = self._named.get(name)
            if parameter is None or tensor.shape not in ((), parameter.shape):
                raise CheckpointError(f"{source}: optimizer state {full!r} fits no parameter")
            if self._owner[name] == self._peers.rank:
                fused = self._adamw.param_groups[0]["fused"]
                device = parameter.device if tensor.ndim or fused else "cpu"
                self._adamw.state[parameter][key] = tensor.to(device)


def _implementation(config: OptimizerConfig) -> dict[str, bool]:
    if config.adamw == "auto":
        return {"fused": True} if config.device == "cuda" else {"foreach": False}
    return {} if config.adamw == "plain" else {config.adamw: True}


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
