"""One step twice, from the same state: the same weights."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.checkpoints.loading import init_policy
from actors.decoding import decode
from actors.models.base import PolicyArchitecture
from cluster.messages import Condition, SamplingSpec
from cluster.model_files.tensors import write_tensors
from learner.grpo.loss import LossConfig
from learner.training.batch import TrainingBatch
from learner.training.optimizer import OptimizerConfig
from tests.unit.learner.training.test_policy import FAMILIES
from tests.unit.learner_cases import make, weights

STEPS = 2
GUIDED = SamplingSpec(cfg_scale=1.5, guidance="guided")


def random_batch(
    architecture: PolicyArchitecture, iteration: int, spec: SamplingSpec
) -> TrainingBatch:
    """Eight rollouts of two conditions, that no policy has drawn."""
    draw = np.random.default_rng(iteration)
    shape = (8, architecture.num_tokens)
    features = draw.normal(size=(2, max(architecture.caption_tokens, 1), 8)).astype(np.float32)
    asked = [Condition(text="", class_index=at, features=features[at]) for at in range(2)]
    return TrainingBatch(
        iteration=iteration,
        tokens=draw.integers(0, architecture.vocab_size, shape).astype(np.int32),
        behaviour=draw.normal(-np.log(architecture.vocab_size), 1, shape).astype(np.float32),
        conditions=tuple(asked[row // 4] for row in range(8)),
        advantages=draw.normal(size=8).astype(np.float32),
        versions=np.full(8, iteration),
        specs=(spec,),
    )


def learned(folder: Path, name: str, cuda: bool) -> list[bytes]:
    """Weights after the same steps of two learners. On a GPU: larger networks and pieces of logits,
    so that more than one thread block has a part in every sum."""
    architecture = FAMILIES[name]
    if cuda:
        size: dict = {"dim": 128, "grid": 12, "vocab_size": 1024}
        more = {"block_size": 144} if name == "taming" else {}
        architecture = dataclasses.replace(architecture, **size, **more)
        decode.LOGITS_AT_ONCE = 1 << 19
    spec = SamplingSpec() if name == "taming" else GUIDED
    spec = dataclasses.replace(spec, top_k=architecture.vocab_size * 3 // 4)
    torch.manual_seed(0)
    file = folder / "policy.safetensors"
    write_tensors(file, init_policy(architecture).state_dict(), architecture.to_dict())
    found = []
    for _ in range(2):
        learner = make(
            str(file),
            optimizer=OptimizerConfig(
                num_gpus=int(cuda), microbatch=3, precision="bf16", checkpointing=True
            ),
            loss=LossConfig(kl_coef=0.1),
            spec=spec,
            reproducible=cuda,
        )
        start = weights(learner)
        for iteration in range(STEPS):
            learner.step(random_batch(architecture, iteration, spec))
        assert not torch.equal(weights(learner), start)
        found.append(weights(learner).numpy().tobytes())
    return found


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("cuda", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_a_step_from_the_same_state_gives_the_same_weights(
    tmp_path: Path, name: str, cuda: bool
) -> None:
    if not cuda:
        first, second = learned(tmp_path, name, cuda)
    else:  # in a process of its own: deterministic algorithms are chosen before CUDA starts
        with multiprocessing.get_context("spawn").Pool(1) as process:
            first, second = process.apply(learned, (tmp_path, name, cuda))
    assert first == second
