"""The learner role: owns the trained weights, takes GRPO steps, gives out snapshots."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.errors import FleetError, LearningError
from cluster.io.background import Background
from cluster.messages import SamplingSpec, WeightSnapshot
from cluster.model_files.tensors import read_tensors
from cluster.model_files.weight_checks import check_finite
from cluster.program.precision import exact_fp32
from cluster.spans import Span, Stopwatch
from cluster.weights import Packer, SnapshotName, open_snapshot, pack_adapters
from learner.grpo.entropy import Measured, initial_state, next_state
from learner.grpo.loss import grpo_loss
from learner.training.batch import StepReport, TrainingBatch
from learner.training.config import LearnerConfig
from learner.training.data_parallel import DataParallelGroup, join, open_rendezvous
from learner.training.optimizer import PolicyAdamW
from learner.training.policy import LearnerPolicy
from learner.training.preparation import (
    ForwardPasses,
    PreparedBatch,
    StatsAccumulator,
    minibatch_indices,
)
from learner.training.real_tokens import RealTokens, cross_entropy
from learner.training.skips import not_finite_because, too_many_skipped
from learner.training.state_files import OPTIMIZER_FILE, LearnerFiles, LearnerState, TensorFile

BEHAVIOUR_STATS = ("entropy", "mismatch_kl", "logprob_gap", "reference_kl")
"""Statistics of the policy that drew the rollouts: of the first pass, before its first update."""

MUST_BE_FINITE = ("surrogate", "entropy", "reference_kl", "real_ce", "grad_norm")
"""What must be finite. The others compare with the sampler: where filters round differently, a
token that was drawn may have probability 0 here, which has no gradient and is seen in them."""


class Learner:
    """Holds fp32 weights and optimizer; every answer is plain data.

    Several make a group: each is told its place (`meet`, `join`), and then all are asked the same
    questions with the same arguments, at the same time. The first one's answers count.
    """

    def __init__(self, config: LearnerConfig, name: str = "learner") -> None:
        exact_fp32()
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
            self._real = RealTokens(config.real, self._policy.module, config.tokenizer, config.seed)
        self._base_entropy: float | None = None
        self._entropy = initial_state(config.entropy)
        self._skipped: list[bool] = []  # whether each of the newest updates was
        self._store: Any = None
        self._writing: Background | None = None
        self._pack = Packer(getattr(torch, config.wire_dtype))
        self._clock = Stopwatch(name)
        self._base: SnapshotName | None = None  # of the frozen weights, where adapters are trained
        self._join_group(DataParallelGroup(device=config.optimizer.device))

    def open_rendezvous(self, host: str, size: int) -> str:
        """Open the meeting point of a group of `size` learners on this machine; returns its
        address."""
        self._store, address = open_rendezvous(host, size)
        return address

    def join(self, rank: int, size: int, address: str) -> None:
        """Take a place in a group; returns when every learner is there.

        Raises:
            FleetError: not all came in time.
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
        """Tell the base policy's mean token entropy (nats), which controllers are anchored to.

        Raises:
            FleetError: the learner is not at the beginning of a run.
        """
        if self.version:
            raise FleetError(
                f"a run begins with a learner that has learned nothing, found one of {self.version}"
                " updates: start it anew, or restore a checkpoint"
            )
        if self._config.spec.learned() == self._config.spec:
            self._base_entropy = base_entropy
        # Else what was sampled is not what is learned: the first step measures it.

    def snapshot(self, on_device: bool = False) -> WeightSnapshot:
        """The current weights, packed for samplers; adapters merged in. Every learner of a group
        must be asked, and the first one has them (the others' snapshots are empty); this holds for
        all kinds of snapshots.

        Args:
            on_device: leave the buffer where the weights are, as a tensor.
        """
        torch.set_num_threads(self._config.optimizer.num_threads)
        weights, config = self._policy.weights(), self._policy.module.config.to_dict()
        device = self._policy.device if on_device else ""
        with self._clock("pack"):
            return self._pack(weights, self.version, config=config, device=device)

    def base_snapshot(self) -> WeightSnapshot:
        """The frozen weights that adapters belong to, in full precision; of version 0, since the
        base policy is what they are."""
        torch.set_num_threads(self._config.optimizer.num_threads)
        config = self._policy.module.config.to_dict()
        with self._clock("pack"):
            return Packer()(self._policy.frozen_weights(), 0, config=config)

    def adapter_snapshot(self) -> WeightSnapshot:
        """The current adapters, which build upon `base_snapshot`."""
        if self._base is None:
            self._base = open_snapshot(self.base_snapshot()).name
        with self._clock("pack"):
            return pack_adapters(self._policy.adapters(), self.version, self._base)

    def step(self, batch: TrainingBatch) -> StepReport:
        """Learn from one iteration's rollouts: one optimizer step, or as many as are configured.

        Raises:
            FleetError: rollouts drawn under another sampling spec, or too stale.
            LearningError: the loss or its gradient was not finite in too many of the last updates
                (`GuardsConfig`); none of these was taken.
        """
        start = time.time()
        options = self._config.optimizer
        torch.set_num_threads(options.num_threads)
        staleness = self._check_batch(batch)
        prepared, before = self._passes.prepare(batch, proximal=options.minibatches > 1)
        lr = options.lr_at(batch.iteration, self._config.iterations)
        steps = [
            self._update(batch, prepared, rows, update, lr)
            for update, rows in self._minibatches(batch)
        ]
        self.version += 1
        # The first steps of the first pass see the policy that acted, or nearly so.
        measured = [name for name in BEHAVIOUR_STATS if name in steps[0]]
        acted = _mean(_applied(steps[: options.minibatches]), measured) | before
        others = [name for name in steps[0] if name not in acted]
        metrics = self._metrics(acted | _mean(_applied(steps), others))
        metrics |= {"policy/staleness": float(staleness), "loss/lr": lr}
        metrics["guards/skipped_updates"] = sum(not _finite(step) for step in steps)
        if math.isfinite(acted["entropy"]):
            self._update_entropy_coefficient(batch.iteration, acted["entropy"])
        if self._base_entropy is not None:
            metrics["policy/base_entropy"] = self._base_entropy
        span = Span(self.name, "learn", start, time.time())
        return StepReport(version=self.version, metrics=metrics, spans=(*self._clock.take(), span))

    def save(self, directory: Path, background: bool = False) -> None:
        """Write policy, optimizer and counters into an existing directory. Complete, and the same
        whatever the number of learners.

        Args:
            background: copy them (once more in the host's memory: policy and optimizer, 12 bytes a
                parameter, less where only adapters are trained) and return; a thread writes, and
                `saved` tells when it has.

        Raises:
            StorageError: they could not be written.
        """
        self._writing = None
        optimizer, files = self._optimizer.tensors(), self._policy.files()
        if not self._dp_group.first:
            return
        content = LearnerFiles({**files, OPTIMIZER_FILE: TensorFile(optimizer)}, self._state())
        if not background:
            content.write(directory)
            return
        content = content.copied()
        self._writing = Background("writing a checkpoint", lambda: content.write(directory))

    def saved(self, wait_s: float = 0.0) -> bool:
        """Whether everything that `save` was asked for is written, after so long at most.

        Raises:
            StorageError: it could not be written.
        """
        return self._writing is None or self._writing.done(wait_s)

    def restore(self, directory: Path) -> int:
        """Inverse of `save`; returns the policy version.

        Raises:
            CheckpointError: a file is missing, damaged or of another model.
        """
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
        """The rows of each optimizer step, numbered."""
        options = self._config.optimizer
        every = [
            rows
            for epoch in range(options.updates_per_iteration)
            for rows in minibatch_indices(
                len(batch.tokens), options.minibatches, self._config.seed, batch.iteration, epoch
            )
        ]
        return list(enumerate(every))

    def _update(
        self,
        batch: TrainingBatch,
        prepared: PreparedBatch,
        rows: np.ndarray,
        update: int,
        lr: float,
    ) -> dict[str, float]:
        """One optimizer step on `rows` of the whole batch; returns its statistics. Where these are
        not finite the step is left out: weights and optimizer stay as they were. They are of the
        whole batch, so the learners of a group decide alike."""
        self._optimizer.zero_grad()
        mine = self._dp_group.shard(len(batch.tokens))
        here = rows[(rows >= mine.start) & (rows < mine.stop)] - mine.start
        part = prepared if len(here) == len(prepared) else prepared[here]
        most = self._dp_group.max_local(rows, len(batch.tokens))
        stats = self._accumulate(part, len(rows), most)
        if self._real is not None:
            stats["real_ce"] = self._learn_from_real(batch.iteration, update)
        stats["grad_norm"] = self._optimizer.limit()
        skipped = not _finite(stats)
        if skipped:
            self._optimizer.zero_grad()
        else:
            self._optimizer.step(lr)
        self._record_skip(skipped, stats, f"iteration {batch.iteration + 1}, update {update + 1}")
        return stats

    def _record_skip(self, skipped: bool, stats: dict[str, float], where: str) -> None:
        """Remember whether an update was skipped; too many end the run."""
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

    def _accumulate(self, part: PreparedBatch, total: int, most: int) -> dict[str, float]:
        """Gradients of this learner's part of `total` rollouts, microbatch by microbatch; returns
        the mean statistics of them all. most: rollouts that one learner has of them."""
        config = self._config
        in_loss = config.loss.kl_coef > 0 and config.loss.kl_in == "loss"
        sums = StatsAccumulator(reference_kl=in_loss)
        for rows in self._passes.microbatches(part, most):
            share = len(rows) / total
            found = self._policy.logprobs(rows.tokens, self._passes.conditions(rows), config.spec)
            loss, stats = grpo_loss(
                found.logprobs,
                found.entropies,
                rows.behaviour,
                rows.advantages,
                rows.reference if in_loss else None,
                self._entropy.coefficient,
                config.loss,
                old=rows.proximal if config.loss.ratio_to == "proximal" else None,
                weights=rows.weights,
                unfiltered=found.unfiltered,
            )
            (loss * share).backward()
            sums.add(stats, share)
        return sums.total(self._dp_group)

    def _learn_from_real(self, iteration: int, update: int) -> float:
        """Add the gradient of the cross-entropy on real tokens; returns its mean, nats."""
        assert self._real is not None
        tokens, conditions = self._real.draw(iteration, update)
        mine = self._dp_group.shard(len(tokens))
        size, sum_of_parts = self._config.optimizer.microbatch, 0.0
        for at in range(mine.start, mine.stop, size):
            rows = slice(at, min(at + size, mine.stop))
            given = self._policy.module.encode(conditions[rows])
            here = torch.from_numpy(tokens[rows]).to(self._policy.device)
            logprobs = self._policy.logprobs(here, given, SamplingSpec()).logprobs
            loss = cross_entropy(logprobs) * (len(here) / len(tokens))
            (loss * self._config.real.weight).backward()
            sum_of_parts += float(loss.detach())
        most = self._dp_group.max_local(np.arange(len(tokens)), len(tokens))
        self._passes.pad_passes(mine.stop - mine.start, most, conditions[:1])
        return self._dp_group.all_sum([sum_of_parts])[0]

    def _metrics(self, found: dict[str, float]) -> dict[str, float]:
        """Names under which the records keep what a step found."""
        names = {name: f"policy/{name}" for name in found}
        names |= {name: f"loss/{name}" for name in ("surrogate", "grad_norm", "real_ce")}
        metrics = {names[name]: value for name, value in found.items()}
        return metrics | {"policy/entropy_coef": self._entropy.coefficient}

    def _update_entropy_coefficient(self, iteration: int, entropy: float) -> None:
        config = self._config
        differs = config.spec.learned() != config.spec
        if self._base_entropy is None and differs and self.version == 1:
            self._base_entropy = entropy  # the first rollouts are the base policy's
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


def _finite(stats: dict[str, float]) -> bool:
    """Whether an update with these statistics may be taken."""
    return all(math.isfinite(stats[name]) for name in MUST_BE_FINITE if name in stats)


def _applied(steps: Sequence[dict[str, float]]) -> Sequence[dict[str, float]]:
    """Statistics of the updates that were taken; of all, if none was, to show what was found."""
    return [step for step in steps if _finite(step)] or steps


def _mean(steps: Sequence[dict[str, float]], names: Sequence[str]) -> dict[str, float]:
    """Mean of each of some statistics over optimizer steps."""
    return {name: sum(step[name] for step in steps) / len(steps) for name in names}
