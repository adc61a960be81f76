"""A learner's rollouts as tensors, and the forward passes that prepare a step."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.messages import SamplingSpec
from learner.grpo.kl import divergence, k3, penalised_advantages
from learner.grpo.loss import LossConfig, LossStats
from learner.grpo.off_policy import (
    kept_weights,
    kept_weights_of_sequences,
    tokens_in_band,
    truncated_weights,
)
from learner.training.batch import TrainingBatch
from learner.training.data_parallel import DataParallelGroup
from learner.training.policy import LearnerPolicy
from learner.training.transfers import StepConditions, to_device


@dataclass(frozen=True, kw_only=True)
class PreparedBatch:
    """B rollouts of this learner, with what is constant over an iteration's updates."""

    tokens: Tensor
    """(B, T) int64"""
    conditions: StepConditions
    behaviour: Tensor
    """(B, T)"""
    advantages: Tensor
    """(B,), or (B, 1) or (B, T) with KL in the reward"""
    proximal: Tensor | None = None
    """(B, T) logprobs before the first update."""
    unfiltered: Tensor | None = None
    """(B, T) the same before top-k and top-p, for the KL to the reference."""
    reference: Tensor | None = None
    """(B, T) logprobs of the frozen base policy, before top-k and top-p."""
    weights: Tensor | None = None
    """(B, T) or (B, 1), of the surrogate."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, indices: np.ndarray | slice) -> PreparedBatch:
        fields = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        device = self.tokens.device
        chosen = indices if isinstance(indices, slice) else to_device(indices, device)
        for name, value in fields.items():
            if isinstance(value, Tensor):
                fields[name] = value[chosen]
        fields["conditions"] = self.conditions[indices]
        return PreparedBatch(**fields)

    def microbatches(self, size: int) -> Iterator[PreparedBatch]:
        """Microbatches of at most `size` rollouts, in order."""
        for at in range(0, len(self), size):
            yield self[slice(at, at + size)]


class ForwardPasses:
    """Passes over an iteration's rollouts that take no step."""

    def __init__(
        self,
        policy: LearnerPolicy,
        loss: LossConfig,
        spec: SamplingSpec,
        size: int,
        dp_group: DataParallelGroup,
    ) -> None:
        """size: most rollouts of one pass."""
        self._policy, self._loss, self._spec = policy, loss, spec
        self._size, self._dp_group = size, dp_group
        self._known: StepConditions | None = None  # for dummy passes

    def prepare(
        self, batch: TrainingBatch, *, proximal: bool
    ) -> tuple[PreparedBatch, dict[str, float]]:
        """This learner's share of a batch, with the logprobs, weights and advantages that the loss
        configuration asks for.

        Args:
            proximal: compute logprobs before the update even if the loss needs none.

        Returns:
            The share, and metrics of the whole batch.
        """
        shard, total = self._dp_group.shard(len(batch.tokens)), len(batch.tokens)
        tokens, behaviour, advantages = (
            to_device(array[shard], self._policy.device)
            for array in (batch.tokens, batch.behaviour, batch.advantages)
        )
        # a learner without rollouts needs a condition for its dummy passes
        own = batch.conditions[shard] or batch.conditions[:1]
        conditions = StepConditions(self._policy.module, own)
        self._known = conditions[:1]
        prepared = PreparedBatch(
            tokens=tokens.long(),
            conditions=conditions[: len(tokens)],
            behaviour=behaviour,
            advantages=advantages,
        )
        metrics: dict[str, float] = {}
        if self._loss.kl_coef > 0:
            prepared = dataclasses.replace(prepared, reference=self._reference(prepared, total))
        if proximal or self._loss.needs_proximal:
            prepared, metrics = self._with_proximal(prepared, total)
        if self._loss.kl_in == "reward" and self._loss.kl_coef > 0:
            prepared, of_kl = self._with_kl(prepared, total)
            metrics |= of_kl
        if self._loss.importance_cap or self._loss.masks:
            prepared, of_weights = self._with_weights(prepared, total)
            metrics |= of_weights
        return prepared, metrics

    def microbatches(self, part: PreparedBatch, max_local: int) -> Iterator[PreparedBatch]:
        """Microbatches of this learner's share, then dummy passes up to the number of passes of the
        learner with `max_local` rollouts."""
        yield from part.microbatches(self._size)
        assert self._known is not None
        self.pad_passes(len(part), max_local, self._known)

    def count(self, samples: int) -> int:
        """Number of passes over so many samples."""
        return -(-samples // self._size)

    def pad_passes(self, local: int, max_local: int, known: StepConditions) -> None:
        """Dummy passes of a learner with `local` samples, to match one with `max_local`."""
        for _ in range(self.count(max_local) - self.count(local)):
            self._policy.dummy_pass(known.batch())

    def _microbatches(self, prepared: PreparedBatch, total: int) -> Iterator[PreparedBatch]:
        return self.microbatches(prepared, self._dp_group.max_local(np.arange(total), total))

    @torch.no_grad()
    def _reference(self, prepared: PreparedBatch, total: int) -> Tensor:
        parts = [torch.empty_like(prepared.behaviour[:0])]
        with self._policy.reference() as module:
            shared = module is self._policy.module  # else it is unsharded
            microbatches = (
                self._microbatches(prepared, total) if shared else prepared.microbatches(self._size)
            )
            for part in microbatches:
                given = part.conditions.batch()
                parts.append(
                    self._policy.reference_logprobs(module, part.tokens, given, self._spec)
                )
        return torch.cat(parts)

    @torch.no_grad()
    def _with_proximal(
        self, prepared: PreparedBatch, total: int
    ) -> tuple[PreparedBatch, dict[str, float]]:
        """Add logprobs before the update; returns metrics of the behaviour policy."""
        none = torch.empty_like(prepared.behaviour[:0])
        parts, entropies = [(none, none)], [torch.zeros((), device=none.device)]
        for part in self._microbatches(prepared, total):
            found = self._policy.logprobs(part.tokens, part.conditions.batch(), self._spec)
            parts.append((found.logprobs, found.unfiltered))
            entropies.append(found.entropies.sum())
        entropy = sum(torch.stack(entropies).tolist())
        proximal, unfiltered = (torch.cat(column) for column in zip(*parts))
        behaviour = prepared.behaviour
        gap = (proximal - behaviour).abs().max() if len(prepared) else torch.zeros(())
        mismatch, entropy = self._token_means(total, k3(behaviour, proximal).sum(), entropy)
        return dataclasses.replace(prepared, proximal=proximal, unfiltered=unfiltered), {
            "entropy": entropy,
            "mismatch_kl": mismatch,
            "logprob_gap": self._dp_group.all_max([float(gap)])[0],
        }

    def _with_kl(
        self, prepared: PreparedBatch, total: int
    ) -> tuple[PreparedBatch, dict[str, float]]:
        """Subtract the KL to the reference from the advantages; the loss then has no KL."""
        assert prepared.unfiltered is not None
        assert prepared.reference is not None
        loss = self._loss
        estimates = divergence(
            prepared.unfiltered, prepared.reference, loss.kl_estimator, loss.kl_level
        )
        mean = self._token_means(total, estimates.mean(1).sum() * prepared.tokens.shape[1])[0]
        advantages = penalised_advantages(
            prepared.advantages.unsqueeze(-1), estimates, loss.kl_coef, mean
        )
        changed = dataclasses.replace(prepared, advantages=advantages, reference=None)
        return changed, {"reference_kl": mean}

    def _with_weights(
        self, prepared: PreparedBatch, total: int
    ) -> tuple[PreparedBatch, dict[str, float]]:
        """Add truncated importance weights, zero for masked tokens."""
        assert prepared.proximal is not None
        loss, metrics = self._loss, {}
        weights = torch.ones_like(prepared.behaviour)
        if loss.importance_cap:
            weights = truncated_weights(
                prepared.proximal,
                prepared.behaviour,
                loss.importance_cap,
                sequence=loss.aggregation == "sequence-ratio",
            )
            metrics["importance"] = self._token_means(
                total, weights.mean(1).sum() * self._tokens()
            )[0]
        if loss.masks:
            kept = tokens_in_band(
                prepared.proximal,
                prepared.behaviour,
                loss.mask_low,
                loss.mask_high or float("inf"),
            )
            share = self._token_means(total, kept.sum())[0]
            metrics["kept_share"] = share
            if loss.length_divisor:  # a constant divisor: kept tokens do not gain weight
                weights = weights * kept
            elif loss.aggregation == "seq-mean":
                weights = weights * kept_weights_of_sequences(kept)
            else:
                weights = weights * kept_weights(kept, share)
        return dataclasses.replace(prepared, weights=weights), metrics

    def _tokens(self) -> int:
        return self._policy.module.num_tokens

    def _token_means(self, total: int, *sums: Tensor | float) -> list[float]:
        """Means over the tokens of all learners, from sums over this learner's."""
        count = total * self._tokens()
        return [value / count for value in self._dp_group.all_sum([float(value) for value in sums])]


class StatsAccumulator:
    """Sums loss statistics over microbatches; waits for the device once, in `total`.

    Args:
        reference_kl: whether it is measured.
    """

    def __init__(self, *, reference_kl: bool) -> None:
        names = [item.name for item in dataclasses.fields(LossStats)]
        self._names = [name for name in names if reference_kl or name != "reference_kl"]
        self._parts: list[tuple[float, Tensor]] = []

    def add(self, stats: LossStats, share: float) -> None:
        """share: rollouts of this microbatch, of those of all learners."""
        values = [getattr(stats, name).float() for name in self._names]
        self._parts.append((share, torch.stack(values)))

    def total(self, dp_group: DataParallelGroup) -> dict[str, float]:
        """Means over all learners' rollouts; of logprob_gap the maximum."""
        names, sums, largest = self._names, dict.fromkeys(self._names, 0.0), 0.0
        parts = torch.stack([values for _, values in self._parts]).tolist() if self._parts else []
        for (share, _), values in zip(self._parts, parts):
            for name, value in zip(names, values):
                sums[name] += share * value
                if name == "logprob_gap":
                    largest = float(np.maximum(largest, value))  # NaN stays NaN
        found = dict(zip(names, dp_group.all_sum(list(sums.values()))))
        return found | {"logprob_gap": dp_group.all_max([largest])[0]}


def minibatch_indices(
    total: int, parts: int, seed: int, iteration: int, epoch: int
) -> Sequence[np.ndarray]:
    """Sample indices of the minibatches of one pass over `total` rollouts. One minibatch has all in
    order; several are drawn anew for each pass, a function of (seed, iteration, pass)."""
    if parts == 1:
        return [np.arange(total)]
    key = [seed, zlib.crc32(b"minibatches")]
    generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, epoch, iteration]))
    pieces = np.array_split(generator.permutation(total), parts)
    return [np.sort(piece) for piece in pieces if len(piece)]
