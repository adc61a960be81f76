"""A learner on a tiny policy, and batches that it would be given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from actors.checkpoints.loading import PolicyConfig
from actors.decoding.decode import decode_tokens, rollout_uniforms, token_logprobs
from cluster.messages import Condition, RequestKey, SamplingSpec
from cluster.model_files.tensors import write_tensors
from cluster.weights import load_weights
from learner.training.batch import TrainingBatch
from learner.training.config import LearnerConfig
from learner.training.learner import Learner
from learner.training.optimizer import OptimizerConfig
from tests.unit.helpers import TINY, tiny_policy


def tiny_policy_file(folder: Path) -> str:
    file = folder / "policy.safetensors"
    write_tensors(file, tiny_policy().state_dict(), TINY.to_dict())
    return str(file)


def make(policy_file: str, **changes: object) -> Learner:
    fields: dict = {
        "policy": PolicyConfig(checkpoint=policy_file),
        "optimizer": OptimizerConfig(lr=1e-2, microbatch=8),
        "iterations": 10,
        **changes,
    }
    return Learner(LearnerConfig(**fields))


def batch_of(
    learner: Learner, iteration: int = 0, rows: int = 8, spec: SamplingSpec | None = None
) -> TrainingBatch:
    """Rollouts that the learner's own weights have drawn, with made-up advantages."""
    spec = spec or SamplingSpec()
    policy = tiny_policy()
    load_weights(policy, learner.snapshot())
    draws = rollout_uniforms(3, RequestKey("train", iteration, 0), rows, TINY.num_tokens)
    asked = tuple(Condition(text="", class_index=row % TINY.num_classes) for row in range(rows))
    decoded = decode_tokens(policy, policy.encode(asked), torch.from_numpy(draws), spec)
    return TrainingBatch(
        iteration=iteration,
        tokens=decoded.tokens.numpy().astype(np.int32),
        behaviour=decoded.logprobs.numpy(),
        conditions=asked,
        advantages=np.linspace(-1, 1, rows).astype(np.float32),
        versions=np.full(rows, learner.version),
        specs=(spec,),
    )


def logprobs_of(learner: Learner, batch: TrainingBatch) -> np.ndarray:
    """(B, T) of the learner's published weights."""
    policy = tiny_policy()
    load_weights(policy, learner.snapshot())
    tokens = torch.from_numpy(batch.tokens).long()
    given = policy.encode(batch.conditions)
    return token_logprobs(policy, tokens, given, SamplingSpec())[0].numpy()


def weights(learner: Learner) -> torch.Tensor:
    return torch.from_numpy(learner.snapshot().buffer.copy()).view(torch.float32)


@contextmanager
def optimizer_steps(look: Callable[[torch.optim.Optimizer], object]) -> Iterator[None]:
    """Look at the optimizer just before each of its steps."""
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: look(optimizer))
    try:
        yield
    finally:
        hook.remove()


def parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def gradient(learner: Learner, batch: TrainingBatch, limit: float = 1.0) -> torch.Tensor:
    """Of the whole batch, all trained parameters in a row, as the step on it finds it: that is, one
    step is taken.

    limit: the learner's `max_grad_norm`; it is undone.
    """
    found: list[torch.Tensor] = []
    with optimizer_steps(lambda of: found.extend(p.grad.flatten() for p in parameters(of))):
        norm = learner.step(batch).metrics["loss/grad_norm"]
    return torch.cat(found) * max(1.0, (norm + 1e-6) / limit)
