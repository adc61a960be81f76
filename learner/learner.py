"""The learner role: owns the trained weights, takes GRPO steps, gives out snapshots."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgpack
import torch
from torch import Tensor

from actors.decode import token_logprobs
from actors.models.base import Conditions
from actors.models.loading import PolicyConfig, PolicyModule, load_policy
from cluster.errors import CheckpointError, FleetError
from cluster.messages import SamplingSpec, Span, WeightSnapshot
from cluster.roles import Resources
from cluster.tensors import load_strict, read_tensors, write_tensors
from cluster.weights import pack_weights
from learner.batch import TrainingBatch
from learner.entropy import EntropyConfig, initial_coefficient, next_coefficient
from learner.loss import LossConfig, LossStats, grpo_loss

POLICY_FILE = "policy.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "learner.msgpack"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Resources):
    """AdamW, its schedule, and the learner's resources."""

    lr: float = 1e-5
    """Peak learning rate, > 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's averages of the gradient and of its square, in [0, 1)."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, >= 0."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    decay_from: float = 0.5
    """Share of the iterations after which the learning rate falls linearly, in [0, 1]."""
    final_lr: float = 0.05
    """Share of the peak learning rate that is left at the end, in [0, 1]."""
    microbatch: int = 32
    """Most rollouts in one forward pass; gradients accumulate over the batch."""

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
        if self.microbatch < 1:
            raise ValueError(f"microbatch must be >= 1, found {self.microbatch}")

    def lr_at(self, iteration: int, iterations: int) -> float:
        """Learning rate of one iteration: flat, then linear to final_lr."""
        progress = iteration / max(iterations - 1, 1)
        if progress <= self.decay_from or self.decay_from == 1:
            return self.lr
        fallen = (progress - self.decay_from) / (1 - self.decay_from)
        return self.lr * (1 - (1 - self.final_lr) * fallen)


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """What a learner is built from."""

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    spec: SamplingSpec = field(default_factory=SamplingSpec)
    iterations: int = 1
    max_staleness: int = 0


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step did."""

    version: int
    """Policy version after the step."""
    metrics: dict[str, float]
    spans: tuple[Span, ...]


class Learner:
    """Holds fp32 weights and optimizer; every answer is plain data."""

    def __init__(self, config: LearnerConfig, name: str = "learner") -> None:
        self.name, self._config = name, config
        self._device = config.optimizer.device
        self.version = 0
        self._policy = load_policy(config.policy, device=self._device).requires_grad_(True)
        self._reference: PolicyModule | None = None
        if config.loss.kl_coef > 0:
            self._reference = load_policy(config.policy, device=self._device)
        self._optimizer = torch.optim.AdamW(
            self._policy.parameters(),
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
        )
        self._base_entropy: float | None = None
        self._entropy_coef = initial_coefficient(config.entropy)

    def start(self, base_entropy: float) -> None:
        """Tell the base policy's mean token entropy (nats), which controllers are anchored to."""
        self._base_entropy = base_entropy

    def snapshot(self) -> WeightSnapshot:
        """The current weights, packed for samplers."""
        torch.set_num_threads(self._config.optimizer.num_threads)
        return pack_weights(self._policy.state_dict(), self.version)

    def step(self, batch: TrainingBatch) -> StepReport:
        """One optimizer step on one iteration's rollouts.

        Raises:
            FleetError: rollouts drawn under another sampling spec, or too stale.
        """
        start = time.time()
        torch.set_num_threads(self._config.optimizer.num_threads)
        staleness = self._check(batch)
        lr = self._config.optimizer.lr_at(batch.iteration, self._config.iterations)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.zero_grad(set_to_none=True)
        stats = self._accumulate(batch)
        limit = self._config.optimizer.max_grad_norm
        grad_norm = torch.nn.utils.clip_grad_norm_(self._policy.parameters(), limit)
        self._optimizer.step()
        self.version += 1
        metrics = {
            "policy/entropy": stats["entropy"],
            "policy/entropy_coef": self._entropy_coef,
            "policy/mismatch_kl": stats["mismatch_kl"],
            "policy/reference_kl": stats["reference_kl"],
            "policy/logprob_gap": stats["logprob_gap"],
            "policy/ratio": stats["ratio"],
            "policy/clip_fraction": stats["clip_fraction"],
            "policy/staleness": float(staleness),
            "loss/surrogate": stats["surrogate"],
            "loss/grad_norm": float(grad_norm),
            "loss/lr": lr,
        }
        self._steer_entropy(stats["entropy"])
        span = Span(self.name, "learn", start, time.time())
        return StepReport(version=self.version, metrics=metrics, spans=(span,))

    def save(self, directory: Path) -> None:
        """Write policy, optimizer and counters into an existing directory."""
        config = self._policy.config.to_dict()
        write_tensors(directory / POLICY_FILE, self._policy.state_dict(), config)
        write_tensors(directory / OPTIMIZER_FILE, dict(self._optimizer_tensors()), {})
        state = {
            "version": self.version,
            "entropy_coef": self._entropy_coef,
            "base_entropy": self._base_entropy,
        }
        (directory / STATE_FILE).write_bytes(msgpack.packb(state))

    def restore(self, directory: Path) -> int:
        """Inverse of `save`; returns the policy version.

        Raises:
            CheckpointError: a file is missing, damaged or of another model.
        """
        policy_file, optimizer_file = directory / POLICY_FILE, directory / OPTIMIZER_FILE
        load_strict(self._policy, read_tensors(policy_file), str(policy_file))
        self._load_optimizer(read_tensors(optimizer_file), str(optimizer_file))
        state = msgpack.unpackb((directory / STATE_FILE).read_bytes())
        self.version = state["version"]
        self._entropy_coef = state["entropy_coef"]
        self._base_entropy = state["base_entropy"]
        return self.version

    def _check(self, batch: TrainingBatch) -> int:
        if batch.specs != (self._config.spec,):
            raise FleetError(
                f"the learner computes logprobs under {self._config.spec}, but rollouts were "
                f"sampled under {batch.specs}: the ratio would mean nothing"
            )
        staleness = self.version - int(batch.versions.min())
        if staleness > self._config.max_staleness:
            raise FleetError(
                f"rollouts of version {batch.versions.min()} reached version {self.version}: "
                f"staleness {staleness} is above max_staleness {self._config.max_staleness}"
            )
        return staleness

    def _accumulate(self, batch: TrainingBatch) -> dict[str, float]:
        """Gradients of the whole batch, microbatch by microbatch; returns its mean statistics."""
        config, total = self._config, len(batch.tokens)
        sums: dict[str, float] = {}
        for tokens, conditions, behaviour, advantages in self._microbatches(batch):
            share = len(tokens) / total
            logprobs, entropies = token_logprobs(self._policy, tokens, conditions, config.spec)
            reference = None
            if self._reference is not None:
                with torch.no_grad():
                    reference, _ = token_logprobs(self._reference, tokens, conditions, config.spec)
            loss, stats = grpo_loss(
                logprobs,
                entropies,
                behaviour,
                advantages,
                reference,
                self._entropy_coef,
                config.loss,
            )
            (loss * share).backward()
            _gather(sums, stats, share)
        return sums

    def _microbatches(
        self, batch: TrainingBatch
    ) -> Iterator[tuple[Tensor, Conditions, Tensor, Tensor]]:
        """Tokens, conditions, behaviour logprobs and advantages, a microbatch at a time."""
        size = self._config.optimizer.microbatch
        for at in range(0, len(batch.tokens), size):
            rows = slice(at, at + size)
            tokens, behaviour, advantages = (
                torch.from_numpy(array[rows]).to(self._device)
                for array in (batch.tokens, batch.behaviour, batch.advantages)
            )
            conditions = self._policy.encode(batch.conditions[rows])
            yield tokens.long(), conditions, behaviour, advantages

    def _steer_entropy(self, entropy: float) -> None:
        if self._config.entropy.controller == "target":
            if self._base_entropy is None:
                raise FleetError("the target entropy controller needs the base policy's entropy")
            self._entropy_coef = next_coefficient(
                self._config.entropy, self._entropy_coef, entropy, self._base_entropy
            )

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """AdamW's state under the names of the parameters."""
        for name, parameter in self._policy.named_parameters():
            for key, tensor in self._optimizer.state[parameter].items():
                yield f"{key}/{name}", tensor

    def _load_optimizer(self, tensors: dict[str, Tensor], source: str) -> None:
        parameters = dict(self._policy.named_parameters())
        for full, tensor in tensors.items():
            key, _, name = full.partition("/")
            if name not in parameters or tensor.shape not in ((), parameters[name].shape):
                raise CheckpointError(f"{source}: optimizer state {full!r} fits no parameter")
            device = "cpu" if tensor.ndim == 0 else self._device
            self._optimizer.state[parameters[name]][key] = tensor.to(device)


def _gather(sums: dict[str, float], stats: LossStats, share: float) -> None:
    """Add a microbatch's statistics: means weighted by its share, the maximum as it is."""
    for item in dataclasses.fields(stats):
        value = float(getattr(stats, item.name))
        if item.name == "logprob_gap":
            sums[item.name] = max(sums.get(item.name, 0.0), value)
        else:
            sums[item.name] = sums.get(item.name, 0.0) + share * value
