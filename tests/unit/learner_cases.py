"""A learner on a tiny policy, and batches that it would be given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

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


def gradient(learner: Learner, batch: TrainingBatch) -> torch.Tensor:
    """Of the whole batch, before it is limited; all trained parameters in a row."""
    learner._optimizer.zero_grad()
    prepared, _ = learner._passes.prepare(batch, proximal=False)
    learner._accumulate(prepared, len(batch.tokens), len(batch.tokens))
    trained = [p for p in learner._policy.module.parameters() if p.requires_grad]
    return torch.cat([p.grad.flatten().clone() for p in trained])
