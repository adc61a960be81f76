"""The learner role: owns the policy under training, takes GRPO steps, packs snapshots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.clock import epoch
from cluster.errors import FleetError, LearningError
from cluster.io.background import Background
from cluster.messages import SamplingSpec, WeightSnapshot
from cluster.model_files.tensors import read_tensors
from cluster.model_files.weight_checks import check_finite
from cluster.program.precision import refusals_explained, start_computing
from cluster.spans import Span, Stopwatch
from cluster.weights import Packer, SnapshotName, open_snapshot, pack_adapters
from learner.grpo.entropy import Measured, initial_state, next_state
from learner.grpo.loss import grpo_loss
from learner.training.batch import StepReport, TrainingBatch
from learner.training.config import LearnerConfig
from learner.training.data_parallel import DataParallelGroup, join, open_rendezvous
from learner.training.file_exchange import FileExchange
from learner.training.optimizer import PolicyAdamW
from learner.training.policy import LearnerPolicy
from learner.training.preparation import (
    ForwardPasses,
    PreparedBatch,
    StatsAccumulator,
    minibatch_indices,
)
from learner.training.real_tokens import RealTokens, cross_entropy
from learner.training.skips import applied, is_applied, not_finite_because, too_many_skipped
from learner.training.state_files import OPTIMIZER_FILE, LearnerFiles, LearnerState, TensorFile
from learner.training.transfers import StepConditions, to_device

BEHAVIOUR_STATS = ("entropy", "mismatch_kl", "logprob_gap", "reference_kl")
"""Statistics of the behaviour policy: taken in the first pass, before its first update."""


class Learner(FileExchange):
    """Holds fp32 weights and optimizer; every answer is plain data.

    Several learners form a data-parallel group (`open_rendezvous`, `join`). From then on every call
    is made on all of them, with the same arguments; the first one's answer counts.
    """

    def __init__(self, config: LearnerConfig, name: str = "learner") -> None:
        start_computing(reproducible=config.reproducible)
        self.name, self._config = name, config
        self.version = 0
        self._policy = LearnerPolicy(
            config.policy,
            config.optimizer,
            reference=config.loss.kl_coef > 0,
            seed=config.seed,
        )
        self._real: RealTokens | None = None
        if config.real.weight:
            asked = config.conditions
            self._real = RealTokens(
                config.real,
                self._policy.module,
                config.tokenizer,
                config.seed,
                captions=asked.conditions() if asked.captions else (),
            )
        self._base_entropy: float | None = None
        self._entropy = initial_state(config.entropy)
        self._skipped: list[bool] = []  # of the last updates
        self._store: Any = None
        self._writing: Background | None = None
        self._pack = Packer(getattr(torch, config.wire_dtype))
        self._clock = Stopwatch(name)
        self._base: SnapshotName | None = None  # of the frozen weights, with LoRA
        self._join_group(DataParallelGroup(device=config.optimizer.device))
        if config.reproducible:
            with refusals_explained("the policy's backward pass"):
                self._policy.rehearse(config.spec)

    def open_rendezvous(self, host: str, size: int) -> str:
        """Open the rendezvous of a group of `size` learners; returns its address."""
        self._store, address = open_rendezvous(host, size)
        return address

    def join(self, rank: int, size: int, address: str) -> None:
        """Join a group; returns when every learner has.

        Raises:
            FleetError: not all joined in time.
        """
        device, timeout_s = self._config.optimizer.device, self._config.timeout_s
        self._join_group(join(rank, size, address, device, timeout_s, self._store))

    def _join_group(self, dp_group: DataParallelGroup) -> None:
        config, self._dp_group = self._config, dp_group
        self._policy.join(dp_group)
        self._optimizer = PolicyAdamW(self._policy.module, config.optimizer, dp_group)
        self._passes = ForwardPasses(
            self._policy, config.loss, config.spec, config.optimizer.microbatch, dp_group
        )

    def start(self, base_entropy: float) -> None:
        """Begin a run with the base policy's mean token entropy (nats), for entropy controllers.

        Raises:
            FleetError: the learner has made updates.
        """
        if self.version:
            raise FleetError(
                f"a run begins with a learner that has learned nothing, found one of {self.version}"
                " updates: start it anew, or restore a checkpoint"
            )
        if self._config.spec.learned() == self._config.spec:
            self._base_entropy = base_entropy
        # Else (guidance 'distil') the first step measures it: samples are of another policy.

    def snapshot(self, send: Callable[[WeightSnapshot], object] | None = None) -> WeightSnapshot:
        """The current weights, packed for samplers, adapters merged in. All snapshots are
        collective: the first learner's has the weights, the others' are empty.

        Args:
            send: called with the snapshot while its buffer is a tensor on the learner's device; in
                a group on the CPU, where `gather` puts weights.
        """
        torch.set_num_threads(self._config.optimizer.num_threads)
        weights, config = self._policy.weights(), self._policy.module.config.to_dict()
        with self._clock("pack"):
            return self._pack(weights, self.version, config=config, send=send)

    def base_snapshot(self) -> WeightSnapshot:
        """The frozen weights under the adapters, in full precision; version 0."""
        torch.set_num_threads(self._config.optimizer.num_threads)
        config = self._policy.module.config.to_dict()
        with self._clock("pack"):
            return Packer()(self._policy.frozen_weights(), 0, config=config)

    def adapter_snapshot(self) -> WeightSnapshot:
        """The current adapters, to apply to `base_snapshot`."""
        if self._base is None:
            self._base = open_snapshot(self.base_snapshot()).name
        with self._clock("pack"):
            return pack_adapters(self._policy.adapters(), self.version, self._base)

    @refusals_explained("the learner's step")
    def step(self, batch: TrainingBatch) -> StepReport:
        """Learn from one iteration's rollouts: `updates_per_iteration` x `minibatches` optimizer
        steps.

        Raises:
            FleetError: rollouts sampled under another sampling spec, or too stale.
            LearningError: too many of the last updates were not finite (`GuardsConfig`). They were
                skipped.
        """
        start = epoch()
        options = self._config.optimizer
        torch.set_num_threads(options.num_threads)
        staleness = self._check_batch(batch)
        prepared, before = self._passes.prepare(batch, proximal=options.minibatches > 1)
        lr = options.lr_at(batch.iteration, self._config.iterations)
        steps = [
            self._update(batch, prepared, indices, update, lr)
            for update, indices in self._minibatches(batch)
        ]
        self.version += 1
        # The first pass sees the behaviour policy, or nearly so.
        names = [name for name in BEHAVIOUR_STATS if name in steps[0]]
        behaviour = _mean(applied(steps[: options.minibatches]), names) | before
        others = [name for name in steps[0] if name not in behaviour]
        metrics = self._metrics(behaviour | _mean(applied(steps), others))
        metrics |= {"policy/staleness": float(staleness), "loss/lr": lr}
        metrics["guards/skipped_updates"] = sum(not is_applied(step) for step in steps)
        if math.isfinite(behaviour["entropy"]):
            self._update_entropy_coefficient(batch.iteration, behaviour["entropy"])
        if self._base_entropy is not None:
            metrics["policy/base_entropy"] = self._base_entropy
        span = Span(self.name, "learn", start, epoch())
        return StepReport(version=self.version, metrics=metrics, spans=(*self._clock.take(), span))

    def save(self, directory: Path | None, background: bool = False) -> None:
        """Write the learner's files of a checkpoint; they do not depend on the number of learners.

        Args:
            directory: exists; None: the exchange folder, emptied.
            background: copy policy and optimizer (12 bytes a parameter of host memory until
                `saved`; from a GPU up to 21, page-locked in powers of two, and kept for the next
                time), return, and write in a thread.

        Raises:
            StorageError: they could not be written.
        """
        self._writing = None
        optimizer, files = self._optimizer.tensors(), self._policy.files()
        if not self._dp_group.first:
            return
        if directory is None:
            self.drop_files()
            directory = self.exchange_folder()
        content = LearnerFiles({**files, OPTIMIZER_FILE: TensorFile(optimizer)}, self._state())
        if not background:
            content.write(directory)
            return
        if self._dp_group.size == 1:  # what a group has gathered is a copy
            content = content.copied()
        self._writing = Background("writing a checkpoint", lambda: content.write(directory))

    def saved(self, wait_s: float = 0.0) -> bool:
        """Whether `save` has written everything; waits up to `wait_s`.

        Raises:
            StorageError: it could not be written.
        """
        if self._writing is not None and self._writing.done(wait_s):
            self._writing = None  # and its copies
        return self._writing is None

    def restore(self, directory: Path | None) -> int:
        """Inverse of `save`; returns the policy version.

        Raises:
            CheckpointError: a file is missing, damaged or of another model.
        """
        directory = directory or self.exchange_folder()
        state = LearnerState.read(directory)
        self._policy.restore(directory)
        optimizer = directory / OPTIMIZER_FILE
        moments = read_tensors(optimizer)
        check_finite(moments, str(optimizer))
        self._optimizer.load(moments, str(optimizer))
        self.version, self._entropy = state.version, state.entropy
        self._base_entropy = state.base_entropy
        self._skipped = list(state.skipped)
        return self.version

    def _state(self) -> LearnerState:
        return LearnerState(self.version, self._entropy, self._base_entropy, tuple(self._skipped))

    def _check_batch(self, batch: TrainingBatch) -> int:
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

    def _minibatches(self, batch: TrainingBatch) -> list[tuple[int, np.ndarray]]:
        """Number and sample indices of each optimizer step."""
        options, seed, total = self._config.optimizer, self._config.seed, len(batch.tokens)
        every = [
            indices
            for epoch in range(options.updates_per_iteration)
            for indices in minibatch_indices(
                total, options.minibatches, seed, batch.iteration, epoch
            )
        ]
        return list(enumerate(every))

    def _update(
        self,
        batch: TrainingBatch,
        prepared: PreparedBatch,
        indices: np.ndarray,
        update: int,
        lr: float,
    ) -> dict[str, float]:
        """One optimizer step on these samples of the batch; returns its statistics. If they are not
        finite, the step is skipped. They are of all learners, which therefore decide alike."""
        self._optimizer.zero_grad()
        total = len(batch.tokens)
        mine = self._dp_group.shard(total)
        local = indices[(indices >= mine.start) & (indices < mine.stop)] - mine.start
        part = prepared if len(local) == len(prepared) else prepared[local]
        max_local = self._dp_group.max_local(indices, total)
        passes = self._passes.count(max_local) + self._passes.count(self._max_local_real())
        self._policy.begin_update(passes)
        totals = self._accumulate(part, len(indices), max_local)
        real = self._learn_from_real(batch.iteration, update)
        norm = self._optimizer.limit()
        stats = totals.total(self._dp_group)  # waits for the device
        if real is not None:
            stats["real_ce"] = self._dp_group.all_sum([sum(torch.stack(real).tolist())])[0]
        stats["grad_norm"] = float(norm)
        skipped = not is_applied(stats)
        if skipped:
            self._optimizer.zero_grad()
        else:
            self._optimizer.step(lr)
        self._record_skip(skipped, stats, f"iteration {batch.iteration + 1}, update {update + 1}")
        return stats

    def _record_skip(self, skipped: bool, stats: dict[str, float], where: str) -> None:
        """Remember whether an update was skipped; too many stop the run."""
        guards = self._config.guards
        self._skipped = [*self._skipped, skipped][-guards.window :]
        if skipped and too_many_skipped(guards, self._skipped):
            found = ", ".join(f"{name} {value:g}" for name, value in stats.items())
            raise LearningError(
                f"{where}: the loss or its gradient is not finite ({found}). "
                f"{sum(self._skipped)} of the last {len(self._skipped)} updates were left out for "
                f"that, more than guards.max_skipped_share {guards.max_skipped_share:g} allows. "
                f"{not_finite_because(stats)}"
            )

    def _accumulate(self, part: PreparedBatch, total: int, max_local: int) -> StatsAccumulator:
        """Accumulate gradients and statistics over microbatches, without waiting for the device.

        Args:
            part: this learner's share of `total` rollouts.
            max_local: most rollouts that any learner has of them.
        """
        config = self._config
        in_loss = config.loss.kl_coef > 0 and config.loss.kl_in == "loss"
        totals = StatsAccumulator(reference_kl=in_loss)
        for batch in self._passes.microbatches(part, max_local):
            share = len(batch) / total
            found = self._policy.logprobs(batch.tokens, batch.conditions.batch(), config.spec)
            loss, stats = grpo_loss(
                found.logprobs,
                found.entropies,
                batch.behaviour,
                batch.advantages,
                batch.reference if in_loss else None,
                self._entropy.coefficient,
                config.loss,
                old=batch.proximal if config.loss.ratio_to == "proximal" else None,
                weights=batch.weights,
                unfiltered=found.unfiltered,
            )
            (loss * share).backward()
            totals.add(stats, share)
        return totals

    def _learn_from_real(self, iteration: int, update: int) -> list[torch.Tensor] | None:
        """Add the gradient of the cross-entropy on real tokens; returns terms on the device, whose
        sum over all learners is its mean, nats. None without it."""
        if self._real is None:
            return None
        tokens, conditions = self._real.draw(iteration, update)
        mine = self._dp_group.shard(len(tokens))
        given = StepConditions(self._policy.module, conditions[mine] or conditions[:1])
        local = to_device(tokens[mine], self._policy.device)
        size, terms = self._config.optimizer.microbatch, [torch.zeros((), device=local.device)]
        for at in range(0, len(local), size):
            part = slice(at, min(at + size, len(local)))
            asked = given[part].batch()
            logprobs = self._policy.logprobs(local[part], asked, SamplingSpec()).logprobs
            loss = cross_entropy(logprobs) * (len(logprobs) / len(tokens))
            (loss * self._config.real.weight).backward()
            terms.append(loss.detach())
        self._passes.pad_passes(len(local), self._max_local_real(), given[:1])
        return terms

    def _max_local_real(self) -> int:
        """Most real images of an optimizer step that any learner has."""
        images = self._config.real.batch if self._real is not None else 0
        return self._dp_group.max_local(np.arange(images), images)

    def _metrics(self, found: dict[str, float]) -> dict[str, float]:
        """Statistics of a step under their names in metrics.jsonl."""
        names = {name: f"policy/{name}" for name in found}
        names |= {name: f"loss/{name}" for name in ("surrogate", "grad_norm", "real_ce")}
        metrics = {names[name]: value for name, value in found.items()}
        return metrics | {"policy/entropy_coef": self._entropy.coefficient}

    def _update_entropy_coefficient(self, iteration: int, entropy: float) -> None:
        config = self._config
        differs = config.spec.learned() != config.spec
        if self._base_entropy is None and differs and self.version == 1:
            self._base_entropy = entropy  # of the base policy
        if config.entropy.needs_base and self._base_entropy is None:
            raise FleetError(
                f"the {config.entropy.controller} entropy controller needs the base policy's "
                "entropy: call start() before the first step"
            )
        found = Measured(
            entropy=entropy,
            base_entropy=self._base_entropy,
            vocab_size=self._policy.module.vocab_size,
            progress=(iteration + 1) / max(config.iterations, 1),
        )
        self._entropy = next_state(config.entropy, self._entropy, found)


def _mean(steps: Sequence[dict[str, float]], names: Sequence[str]) -> dict[str, float]:
    """Mean of the named statistics over optimizer steps."""
    return {name: sum(step[name] for step in steps) / len(steps) for name in names}
