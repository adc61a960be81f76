"""The public code's nine defects (read in bugrabaran/ar-policy-tuning), each kept out by a test.

1. logprobs of another policy than the one that sampled     here
2. the clip's sign                                         here, and test_loss.py
3. gradients not averaged over learners                    test_parallel.py
4. weights in bf16 that AdamW cannot move                  here
5. condition dropout in the logprob passes                 here
6. a moving-average reference that never moves             test_learner_options.py: frozen, by name
7. a history that starts at half scale                     here
8. real and generated images preprocessed differently      here
9. moments that are not in the checkpoint                  here
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.fleet import InlineFleet
from cluster.messages import MAIN_SPACE, SampleRequest, SamplingSpec
from learner.checkpoints.checkpoint import MOMENTS, restore
from learner.checkpoints.store import CheckpointStore
from learner.fleet_plan import fleet_plan
from learner.grpo.loss import LossConfig, clipped_surrogate
from learner.runs.run_dir import RunDirectory
from learner.training.optimizer import OptimizerConfig
from rewards.combine import Combiner
from rewards.distribution.fid import frechet_distance
from rewards.distribution.moments import Moments
from tests.small_run import run_training, small_config
from tests.unit.learner.training.test_policy import gradients, trained
from tests.unit.learner_cases import (
    batch_of,
    gradient,
    make,
    optimizer_steps,
    parameters,
    tiny_policy_file,
    weights,
)

STEPS, LR = 50, 1e-5


@pytest.fixture
def policy_file(tmp_path: Path) -> str:
    return tiny_policy_file(tmp_path)


def test_1_sampled_and_learned_distribution_are_one_unless_asked_for(policy_file: str) -> None:
    """`distil` is the public code's way, and shows itself: its ratio is not 1 on fresh rollouts."""
    found = {}
    for guidance in ("guided", "distil"):
        spec = SamplingSpec(cfg_scale=1.5, guidance=guidance)
        learner = make(policy_file, spec=spec)
        found[guidance] = learner.step(batch_of(learner, spec=spec)).metrics
    assert found["guided"]["policy/logprob_gap"] < 1e-4
    assert found["distil"]["policy/logprob_gap"] > 0.1
    assert found["distil"]["policy/mismatch_kl"] > 1e-3


def test_1_the_proximal_policy_makes_the_ratio_of_distil_one(policy_file: str) -> None:
    spec = SamplingSpec(cfg_scale=1.5, guidance="distil")
    learner = make(policy_file, spec=spec, loss=LossConfig(ratio_to="proximal"))
    metrics = learner.step(batch_of(learner, spec=spec)).metrics
    assert metrics["policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/clip_fraction"] == 0


@pytest.mark.parametrize(("ratio", "advantage"), [(2.0, 1.0), (0.5, -1.0)])
def test_2_what_has_moved_far_enough_has_no_gradient(ratio: float, advantage: float) -> None:
    """With the inverted sign (min for max) exactly these two would go on."""
    x = torch.tensor([[ratio]], requires_grad=True)
    clipped_surrogate(x, torch.tensor([[advantage]]), 0.2, 0.2).sum().backward()
    assert x.grad.item() == 0
    inverted = torch.minimum(-x * advantage, -x.clamp(0.8, 1.2) * advantage)
    assert torch.autograd.grad(inverted.sum(), x)[0].item() == -advantage


def test_4_bf16_passes_over_fp32_weights_move_what_bf16_weights_leave_still(
    policy_file: str,
) -> None:
    config = OptimizerConfig(
        lr=LR, microbatch=8, schedule="constant", weight_decay=0.0, precision="bf16"
    )
    learner = make(policy_file, optimizer=config, iterations=STEPS, max_staleness=STEPS)
    batch = batch_of(learner)
    slope = gradient(make(policy_file, optimizer=config), batch).bfloat16()
    start = weights(learner)
    for _ in range(STEPS):
        learner.step(batch)
    pure = start.bfloat16().requires_grad_(True)
    adamw = torch.optim.AdamW([pure], lr=LR, betas=config.betas, weight_decay=0.0)
    for _ in range(STEPS):  # the same gradient fifty times: nothing could be more favourable
        pure.grad = slope.clone()
        adamw.step()
    large = (start.abs() >= 2**-7) & (slope != 0)
    assert large.sum() > 10_000
    assert torch.equal(pure.detach()[large], start.bfloat16()[large])  # the defect
    moved = (weights(learner) - start).abs()[large]
    assert moved.mean() > 0.5 * STEPS * LR
    assert (moved > 2 * LR).float().mean() > 0.9
    rounded = weights(learner).bfloat16() != start.bfloat16()
    assert rounded[large].float().mean() > 0.2  # samplers see it, too, if they round to bf16


def test_4_bf16_keeps_weights_gradients_and_state_in_fp32(policy_file: str) -> None:
    learner = make(policy_file, optimizer=OptimizerConfig(precision="bf16", microbatch=8))
    seen: list[torch.dtype] = []

    def look(optimizer: torch.optim.Optimizer) -> None:
        state = [tensor for kept in optimizer.state.values() for tensor in kept.values()]
        for p in parameters(optimizer):
            seen.extend((p.dtype, p.grad.dtype))
        seen.extend(tensor.dtype for tensor in state)

    with optimizer_steps(look):
        metrics = learner.step(batch_of(learner)).metrics
        learner.step(batch_of(learner, 1))  # the optimizer has a state now
    assert set(seen) == {torch.float32}
    assert 1e-4 < metrics["policy/logprob_gap"] < 0.2  # it did compute in bf16


def test_5_nothing_is_dropped_in_a_logprob_pass(policy_file: str) -> None:
    """Not even in train mode: passes repeat to the bit, with the conditions they were given."""
    policy = trained(policy_file)
    assert not policy.module.training
    first = {name: found.clone() for name, found in gradients(policy).items()}
    policy.module.zero_grad()
    policy.module.train()
    again = gradients(policy)
    assert all(torch.equal(again[name], found) for name, found in first.items())


def test_7_the_history_starts_at_full_scale() -> None:
    """Seeded, it *is* the base policy's moments; half of them would be (1 - decay) of the truth."""
    features = np.random.default_rng(0).normal(3, 1, (400, 4))
    moments = Moments.from_features(features)
    np.testing.assert_allclose(moments.mean, features.mean(0))
    after = moments.update(features, decay=0.5)
    np.testing.assert_allclose(after.mean, features.mean(0))
    fid = frechet_distance(after.mean, after.cov, moments.mean, moments.cov)
    assert fid == pytest.approx(0, abs=1e-6)


def test_8_real_and_generated_images_take_one_path() -> None:
    """Features of the same pixels are the same, whether a reward server scores or a reference is
    built; FID of a set with itself is zero."""
    config = small_config()
    with InlineFleet(fleet_plan(config)) as fleet:
        fleet.broadcast(0)
        asked = SampleRequest(
            stream="train",
            iteration=0,
            group=0,
            condition=config.conditions.conditions()[0],
            num_rollouts=6,
            seed=0,
            spec=config.sampling,
        )
        (group,) = fleet.collect(fleet.submit([asked]))
        (images,) = fleet.sample_images([asked])
        built = fleet.features([images], "rewards")[MAIN_SPACE]
    np.testing.assert_array_equal(group.scores.features[MAIN_SPACE], built)


def test_9_moments_are_in_the_checkpoint(tmp_path: Path) -> None:
    config = small_config(iterations=1)
    with InlineFleet(fleet_plan(config)) as fleet:
        run_training(config, fleet)
        combiner = Combiner(config.rewards.terms())
        kept = CheckpointStore(RunDirectory.create(str(tmp_path / "run"), config), config)
        kept.save(1, fleet, combiner)
        kept.close()
        saved = kept.at(1)
        assert (saved.path / MOMENTS).stat().st_size > 0
        state = fleet.moments.state()
    with InlineFleet(fleet_plan(config)) as fresh:
        restore(saved, fresh, combiner)
        assert fresh.moments.state() == state
