"""The learner role on a tiny policy: exactness, bookkeeping, refusals, checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actors.checkpoints.loading import PolicyConfig, load_policy
from cluster.errors import CheckpointError, FleetError
from cluster.messages import SamplingSpec
from cluster.model_files.tensors import write_tensors
from learner.grpo.entropy import EntropyConfig
from learner.grpo.loss import LossConfig
from learner.training.optimizer import OptimizerConfig
from learner.training.state_files import OPTIMIZER_FILE
from tests.unit.helpers import TINY, tiny_policy
from tests.unit.learner_cases import batch_of, logprobs_of, make, tiny_policy_file, weights


@pytest.fixture
def policy_file(tmp_path: Path) -> str:
    return tiny_policy_file(tmp_path)


@pytest.mark.parametrize(
    "spec", [SamplingSpec(), SamplingSpec(cfg_scale=1.5, guidance="guided"), SamplingSpec(top_k=7)]
)
def test_before_the_first_update_the_ratio_is_one(policy_file: str, spec: SamplingSpec) -> None:
    learner = make(policy_file, spec=spec)
    metrics = learner.step(batch_of(learner, spec=spec)).metrics
    assert metrics["policy/ratio"] == pytest.approx(1, abs=1e-4)
    assert metrics["policy/logprob_gap"] <= 1e-4
    assert abs(metrics["policy/mismatch_kl"]) < 1e-6
    assert metrics["policy/clip_fraction"] == 0


def test_a_step_raises_what_had_positive_advantage(policy_file: str) -> None:
    learner = make(policy_file, optimizer=OptimizerConfig(lr=1e-3, microbatch=8))
    batch = batch_of(learner)
    before = logprobs_of(learner, batch)
    assert learner.step(batch).version == 1
    gain = (logprobs_of(learner, batch) - before).sum(1)
    assert gain[-1] > 0 > gain[0]


@pytest.mark.parametrize("microbatch", [1, 3, 4])
def test_accumulation_equals_one_batch_over_five_steps(policy_file: str, microbatch: int) -> None:
    """Adam's scaling enlarges rounding where a gradient is all but zero, hence the wider bound."""
    whole = make(policy_file, optimizer=OptimizerConfig(lr=1e-3, microbatch=8))
    parts = make(policy_file, optimizer=OptimizerConfig(lr=1e-3, microbatch=microbatch))
    for iteration in range(5):
        batch = batch_of(whole, iteration)
        a, b = whole.step(batch).metrics, parts.step(batch).metrics
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=1e-4)


def test_another_spec_is_refused(policy_file: str) -> None:
    learner = make(policy_file)
    with pytest.raises(FleetError, match="the ratio would mean nothing"):
        learner.step(batch_of(learner, spec=SamplingSpec(temperature=0.9)))
    assert learner.version == 0


def test_stale_rollouts_are_refused(policy_file: str) -> None:
    learner = make(policy_file)
    old = batch_of(learner)
    learner.step(old)
    with pytest.raises(FleetError, match="rollouts of version 0 reached version 1: staleness 1"):
        learner.step(old)
    tolerant = make(policy_file, max_staleness=1)
    tolerant.step(old)
    assert tolerant.step(old).metrics["policy/staleness"] == 1


def test_kl_keeps_the_policy_near_its_base(policy_file: str) -> None:
    def drift(kl_coef: float) -> float:
        learner = make(policy_file, loss=LossConfig(kl_coef=kl_coef))
        start = weights(learner)
        for iteration in range(8):
            metrics = learner.step(batch_of(learner, iteration)).metrics
        if not kl_coef:  # not measured, which is not 0
            assert "policy/reference_kl" not in metrics
        else:
            assert metrics["policy/reference_kl"] > 0
        return float((weights(learner) - start).norm())

    assert drift(20.0) < drift(0.0)


def test_entropy_bonus_holds_entropy_up(policy_file: str) -> None:
    def entropy(config: EntropyConfig) -> float:
        learner = make(policy_file, entropy=config)
        learner.start(base_entropy=2.9)
        for iteration in range(10):
            metrics = learner.step(batch_of(learner, iteration)).metrics
        return metrics["policy/entropy"]

    without = entropy(EntropyConfig())
    assert entropy(EntropyConfig(controller="fixed", coef=0.5)) > without
    assert entropy(EntropyConfig(controller="target", gain=1.0, max_coef=0.5)) > without


def test_target_controller_needs_the_base_entropy(policy_file: str) -> None:
    learner = make(policy_file, entropy=EntropyConfig(controller="target"))
    with pytest.raises(FleetError, match="needs the base policy's entropy"):
        learner.step(batch_of(learner))


def test_restored_it_continues_bitwise(policy_file: str, tmp_path: Path) -> None:
    entropy = EntropyConfig(controller="target", coef=0.01)
    straight = make(policy_file, entropy=entropy)
    straight.start(base_entropy=2.9)
    for iteration in range(3):
        straight.step(batch_of(straight, iteration))
    (tmp_path / "saved").mkdir()
    straight.save(tmp_path / "saved")
    resumed = make(policy_file, entropy=entropy)
    assert resumed.restore(tmp_path / "saved") == 3
    for iteration in range(3, 6):
        batch = batch_of(straight, iteration)
        ours, theirs = straight.step(batch), resumed.step(batch)
        assert ours.metrics == theirs.metrics
    assert torch.equal(weights(straight), weights(resumed))


def test_a_foreign_optimizer_file_is_refused(policy_file: str, tmp_path: Path) -> None:
    learner = make(policy_file)
    learner.step(batch_of(learner))
    learner.save(tmp_path)
    write_tensors(tmp_path / OPTIMIZER_FILE, {"exp_avg/other.weight": torch.ones(2)}, {})
    with pytest.raises(CheckpointError, match=r"'exp_avg/other\.weight' fits no parameter"):
        make(policy_file).restore(tmp_path)


def test_learning_rate_schedule() -> None:
    config = OptimizerConfig(lr=1.0, decay_from=0.5, final_lr=0.1)
    rates = [config.lr_at(iteration, 101) for iteration in (0, 50, 75, 100)]
    assert rates == pytest.approx([1.0, 1.0, 0.55, 0.1])
    assert OptimizerConfig(lr=1.0, decay_from=1.0).lr_at(100, 101) == 1.0


def test_loading_builds_the_architecture_without_weights(policy_file: str) -> None:
    config = PolicyConfig(checkpoint=policy_file)
    trained, bare = load_policy(config), load_policy(config, weights=False)
    assert trained.config == bare.config == TINY
    assert torch.equal(trained.output.weight, tiny_policy().output.weight)
    assert not torch.equal(bare.output.weight, trained.output.weight)
