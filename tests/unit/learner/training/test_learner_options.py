"""What the learner's options do, each against what it must equal."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.decoding.decode import token_logprobs
from cluster.errors import CheckpointError, ConfigError, FleetError, LearningError
from cluster.io.run_layout import POLICY_FILE
from cluster.messages import SamplingSpec
from cluster.model_files.tensors import read_tensors
from cluster.weights import load_weights
from learner.grpo.entropy import EntropyConfig
from learner.grpo.loss import LossConfig, grpo_loss
from learner.training.batch import TrainingBatch
from learner.training.data_parallel import DataParallelGroup
from learner.training.learner import Learner
from learner.training.lora import LoraConfig
from learner.training.optimizer import OptimizerConfig
from learner.training.preparation import ForwardPasses, minibatch_indices
from learner.training.skips import GuardsConfig
from tests.unit.helpers import TINY, random_policy, tiny_policy
from tests.unit.learner.training.test_policy import trained
from tests.unit.learner_cases import batch_of, gradient, make, tiny_policy_file, weights


@pytest.fixture
def policy_file(tmp_path: Path) -> str:
    return tiny_policy_file(tmp_path)


def options(**changes: object) -> OptimizerConfig:
    return OptimizerConfig(**{"lr": 1e-2, "microbatch": 8, **changes})


def off_policy(learner: Learner, iteration: int = 0, rows: int = 8) -> TrainingBatch:
    """A batch whose behaviour logprobs differ from the learner's, token by token."""
    batch = batch_of(learner, iteration, rows)
    noise = np.random.default_rng(iteration).normal(0, 0.8, batch.behaviour.shape)
    return dataclasses.replace(batch, behaviour=batch.behaviour + noise.astype(np.float32))


def saved(learner: Learner, folder: Path) -> Path:
    """A new folder with the learner's files."""
    (folder / "saved").mkdir()
    learner.save(folder / "saved")
    return folder / "saved"


def test_schedules() -> None:
    def rates(**fields: object) -> list[float]:
        config = OptimizerConfig(lr=1.0, **fields)
        return [config.lr_at(iteration, 101) for iteration in (0, 4, 50, 75, 100)]

    assert rates(schedule="constant") == [1.0] * 5
    assert rates(decay_from=0.5, final_lr=0.1) == pytest.approx([1, 1, 1, 0.55, 0.1])
    half = 0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2
    cosine = rates(schedule="cosine", decay_from=0.5, final_lr=0.1)
    assert cosine == pytest.approx([1, 1, 1, half, 0.1])
    assert rates(schedule="cosine", decay_from=0.0, final_lr=0.0)[2] == pytest.approx(0.5)
    assert rates(schedule="constant", warmup=10)[:3] == pytest.approx([0.1, 0.5, 1.0])


def test_minibatches_cover_every_rollout_once_and_are_drawn_anew() -> None:
    first, second = (minibatch_indices(10, 3, seed=1, iteration=4, epoch=epoch) for epoch in (0, 1))
    assert [len(part) for part in first] == [4, 3, 3]
    assert sorted(np.concatenate(first).tolist()) == list(range(10))
    assert [part.tolist() for part in first] != [part.tolist() for part in second]
    again = minibatch_indices(10, 3, seed=1, iteration=4, epoch=0)
    assert [part.tolist() for part in again] == [part.tolist() for part in first]
    other = minibatch_indices(10, 3, seed=2, iteration=4, epoch=0)
    assert [part.tolist() for part in other] != [part.tolist() for part in first]
    assert [len(part) for part in minibatch_indices(2, 3, 0, 0, 0)] == [1, 1]
    assert minibatch_indices(10, 1, 0, 0, 0)[0].tolist() == list(range(10))


def test_two_updates_are_two_steps_on_the_same_rollouts(policy_file: str) -> None:
    twice = make(policy_file, optimizer=options(updates_per_iteration=2))
    once = make(policy_file, max_staleness=1)
    batch = batch_of(twice)
    report = twice.step(batch)
    first, second = once.step(batch).metrics, once.step(batch).metrics
    assert torch.equal(weights(twice), weights(once))
    assert (twice.version, once.version) == (1, 2)
    found = report.metrics
    assert found["policy/entropy"] == first["policy/entropy"]  # of the policy that acted
    assert found["policy/logprob_gap"] == first["policy/logprob_gap"] < second["policy/logprob_gap"]
    means = (first["loss/surrogate"] + second["loss/surrogate"]) / 2
    assert found["loss/surrogate"] == pytest.approx(means)


def test_minibatches_are_steps_on_parts(policy_file: str) -> None:
    parts = make(policy_file, optimizer=options(minibatches=2))
    by_hand = make(policy_file, max_staleness=1)
    batch = batch_of(parts)
    metrics = parts.step(batch).metrics
    for rows in minibatch_indices(8, 2, 0, batch.iteration, 0):
        fields = ("tokens", "behaviour", "advantages", "versions")
        part = {name: getattr(batch, name)[rows] for name in fields}
        asked = tuple(batch.conditions[row] for row in rows)
        by_hand.step(dataclasses.replace(batch, conditions=asked, **part))
    assert torch.equal(weights(parts), weights(by_hand))
    assert metrics["policy/logprob_gap"] < 1e-4  # of the policy that acted, not of later steps


def test_fresh_rollouts_give_the_same_step_against_either_policy(policy_file: str) -> None:
    gradients = []
    for ratio_to in ("behaviour", "proximal"):
        learner = make(policy_file, loss=LossConfig(ratio_to=ratio_to))
        gradients.append(gradient(learner, batch_of(learner)))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-6)


LOSSES = {
    "weights": LossConfig(ratio_to="proximal", importance_cap=1.5),
    "masked": LossConfig(ratio_to="proximal", mask_low=0.5, mask_high=2.0),
    "icepop": LossConfig(ratio_to="proximal", importance_cap=5, mask_low=0.5, mask_high=2.0),
    "masked seq-mean": LossConfig(aggregation="seq-mean", mask_low=0.5, mask_high=2.0),
    "gspo": LossConfig(aggregation="sequence-ratio", ratio_to="proximal", importance_cap=1.1),
    "dr-grpo": LossConfig(length_divisor=20, mask_high=2.0),
    "kl reward": LossConfig(kl_coef=0.5, kl_in="reward", kl_estimator="k1"),
    "kl reward, sequence": LossConfig(kl_coef=0.5, kl_in="reward", kl_level="sequence"),
    "kl loss, sequence": LossConfig(kl_coef=0.5, kl_level="sequence"),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_every_form_adds_up_over_microbatches(policy_file: str, loss: LossConfig) -> None:
    gradients = []
    for microbatch in (8, 3, 1):
        learner = make(policy_file, loss=loss, optimizer=options(microbatch=microbatch))
        if loss.kl_coef:  # away from the reference, so that there is a divergence
            learner.step(batch_of(learner))
        gradients.append(gradient(learner, off_policy(learner)))
    largest = gradients[0].abs().max()
    assert largest > 1e-4
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=0, atol=1e-6)


def test_masked_tokens_are_counted_and_have_no_say(policy_file: str) -> None:
    """Advantages of the kept tokens alone give the same gradient."""
    masked = LossConfig(mask_low=0.5, mask_high=2.0)
    learner, plain = make(policy_file, loss=masked), trained(policy_file)
    batch = off_policy(learner)
    passes = ForwardPasses(plain, masked, SamplingSpec(), 8, DataParallelGroup())
    prepared, metrics = passes.prepare(batch, proximal=False)
    ratio = (prepared.proximal - prepared.behaviour).exp()
    kept = (ratio >= 0.5) & (ratio <= 2.0)
    share = kept.float().mean().item()
    assert 0.2 < share < 0.9
    assert metrics["kept_share"] == pytest.approx(share)
    found = gradient(learner, batch)
    policy = plain.logprobs(prepared.tokens, plain.module.encode(batch.conditions), SamplingSpec())
    by_token = prepared.advantages[:, None] * kept / share
    loss, _ = grpo_loss(
        policy.logprobs, policy.entropies, prepared.behaviour, by_token, None, 0.0, LossConfig()
    )
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in plain.module.parameters()])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_kl_in_the_reward_is_centred_and_leaves_the_loss(policy_file: str, tmp_path: Path) -> None:
    config = LossConfig(kl_coef=0.5, kl_in="reward", kl_estimator="k1")
    learner = make(policy_file, loss=config)
    learner.step(batch_of(learner))
    batch = batch_of(learner, 1)
    own = trained(policy_file, reference=True)
    own.restore(saved(learner, tmp_path))
    passes = ForwardPasses(own, config, SamplingSpec(), 8, DataParallelGroup())
    prepared, metrics = passes.prepare(batch, proximal=False)
    assert prepared.reference is None
    assert metrics["reference_kl"] != 0
    paid = prepared.advantages - torch.from_numpy(batch.advantages)[:, None]
    assert paid.mean().item() == pytest.approx(0, abs=1e-6)
    assert paid.abs().max() > 1e-3
    assert learner.step(batch_of(learner, 2)).metrics["policy/reference_kl"] != 0


@pytest.mark.parametrize("place", ["learner", "cpu"])
def test_the_reference_is_the_base_policy_and_stays(
    policy_file: str, place: str, tmp_path: Path
) -> None:
    config = LossConfig(kl_coef=0.1)
    learner = make(policy_file, loss=config, optimizer=options(reference_device=place))
    first = learner.step(batch_of(learner)).metrics["policy/reference_kl"]
    assert first == 0
    for iteration in range(1, 4):
        last = learner.step(batch_of(learner, iteration)).metrics["policy/reference_kl"]
    assert last > 1e-4
    again = make(policy_file, loss=config)  # whose reference has just been loaded
    again.restore(saved(learner, tmp_path))
    batch = batch_of(learner, 4)
    assert again.step(batch).metrics == learner.step(batch).metrics


def test_an_update_that_is_not_finite_is_left_out_and_too_many_stop_the_run(
    policy_file: str,
) -> None:
    learner = make(policy_file)
    batch, before = batch_of(learner), weights(learner)
    batch.behaviour[2, 3] = -np.inf
    assert learner.step(batch).metrics["guards/skipped_updates"] == 1
    assert torch.equal(weights(learner), before)
    learner.step(batch_of(learner))  # the next one finds nothing of it
    assert torch.isfinite(weights(learner)).all()
    after = weights(learner)

    def go_on() -> None:
        for _ in range(GuardsConfig().window):
            again = batch_of(learner)
            again.behaviour[2, 3] = -np.inf
            learner.step(again)

    with pytest.raises(LearningError, match="the loss or its gradient"):
        go_on()
    assert torch.equal(weights(learner), after)


def test_guided_gradients_are_finite_differences_in_both_branches() -> None:
    """Of the sum of logprobs under CFG 1.5: along the class rows, along the null row alone, and
    along everything."""
    policy = random_policy(TINY).requires_grad_(True)
    spec = SamplingSpec(cfg_scale=1.5, guidance="guided")
    torch.manual_seed(1)
    tokens = torch.randint(0, TINY.vocab_size, (4, TINY.num_tokens))
    conditions = policy.encode([dataclasses.replace(c) for c in batch_conditions(4)])

    def value() -> torch.Tensor:
        return token_logprobs(policy, tokens, conditions, spec)[0].mean()

    value().backward()
    table = policy.cls_embedding.embedding_table.weight
    rows = {"class rows": slice(0, 4), "null row": slice(4, 5)}
    for name, where in rows.items():
        direction = torch.zeros_like(table)
        direction[where] = torch.randn(direction[where].shape)
        assert_slope(value, [table], [direction], name)
    everything = [p for p in policy.parameters() if p.ndim > 1]
    assert_slope(value, everything, [torch.randn_like(p) for p in everything], "all")


def batch_conditions(rows: int) -> list:
    from cluster.messages import Condition

    return [Condition(text="", class_index=row % TINY.num_classes) for row in range(rows)]


def assert_slope(value, parameters, directions, name, step: float = 5e-3) -> None:
    """Central difference against the gradient along a direction."""
    slope = sum((p.grad * d).sum().item() for p, d in zip(parameters, directions))
    values = []
    with torch.no_grad():
        for sign in (1, -2, 1):  # there, back and beyond, home
            for parameter, direction in zip(parameters, directions):
                parameter.add_(direction, alpha=sign * step)
            values.append(value().item())
    assert abs(slope) > 1e-3, name
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=0.03, abs=1e-4), name


def test_distil_anchors_entropy_to_the_policy_that_is_learned(policy_file: str) -> None:
    """The sampler's entropies are of the guided mixture; the learned policy's is measured at the
    first step."""
    spec = SamplingSpec(cfg_scale=2.0, guidance="distil")
    learner = make(policy_file, spec=spec, entropy=EntropyConfig(controller="target"))
    learner.start(base_entropy=0.5)
    metrics = learner.step(batch_of(learner, spec=spec)).metrics
    assert metrics["policy/base_entropy"] == metrics["policy/entropy"] != 0.5


def test_paper_controller_runs_and_is_restored(policy_file: str, tmp_path: Path) -> None:
    config = EntropyConfig(controller="paper", damping=0.5)
    learner = make(policy_file, entropy=config)
    with pytest.raises(FleetError, match="the paper entropy controller needs the base"):
        learner.step(batch_of(learner))
    learner = make(policy_file, entropy=config)
    learner.start(base_entropy=2.9)
    found = [learner.step(batch_of(learner, i)).metrics["policy/entropy_coef"] for i in range(3)]
    assert found[0] == 7e-5 < found[1]
    learner.save(tmp_path)
    resumed = make(policy_file, entropy=config)
    resumed.restore(tmp_path)
    batch = batch_of(learner, 3)
    assert resumed.step(batch).metrics == learner.step(batch).metrics


LORA = LoraConfig(rank=2)


def test_adapters_alone_are_trained_and_published_merged(policy_file: str, tmp_path: Path) -> None:
    learner, own = make(policy_file, optimizer=options(lora=LORA)), trained(policy_file, lora=LORA)
    names = [name for name, p in own.module.named_parameters() if p.requires_grad]
    assert len(names) == 2 * TINY.num_layers * 5  # A and B of wqkv, wo, w1, w2, w3
    assert all("lora_" in name for name in names)
    start = weights(learner)
    torch.testing.assert_close(start, weights(make(policy_file)), rtol=0, atol=0)
    batch = batch_of(learner)
    learner.step(batch)
    learner.step(batch_of(learner, 1))
    assert not torch.equal(weights(learner), start)
    own.restore(saved(learner, tmp_path))
    plain = tiny_policy()
    load_weights(plain, learner.snapshot())
    tokens, given = torch.from_numpy(batch.tokens).long(), plain.encode(batch.conditions)
    theirs = token_logprobs(plain, tokens, given, SamplingSpec())[0]
    ours = own.logprobs(tokens, given, SamplingSpec())[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_reference_of_adapters_is_the_policy_without_them(
    policy_file: str, tmp_path: Path
) -> None:
    learner = make(policy_file, loss=LossConfig(kl_coef=0.1), optimizer=options(lora=LORA))
    assert learner.step(batch_of(learner)).metrics["policy/reference_kl"] == 0
    for iteration in (1, 2, 3):
        batch = batch_of(learner, iteration)
        metrics = learner.step(batch).metrics
    assert metrics["policy/reference_kl"] > 0
    tokens, base = torch.from_numpy(batch.tokens).long(), tiny_policy()
    given = base.encode(batch.conditions)
    own = trained(policy_file, reference=True, lora=LORA)
    own.restore(saved(learner, tmp_path))
    with own.reference() as module:
        assert module is own.module  # no copy
        found = own.reference_logprobs(module, tokens, given, SamplingSpec())
    expected = token_logprobs(base, tokens, given, SamplingSpec())[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert own.module.layers[0].attention.wo.lora_A.default.weight.requires_grad


def test_adapters_go_on_bitwise_after_a_restore(policy_file: str, tmp_path: Path) -> None:
    straight = make(policy_file, optimizer=options(lora=LORA))
    straight.step(batch_of(straight))
    (tmp_path / "saved").mkdir()
    straight.save(tmp_path / "saved")
    saved = read_tensors(tmp_path / "saved" / POLICY_FILE)
    assert saved.keys() == tiny_policy().state_dict().keys()
    resumed = make(policy_file, optimizer=options(lora=LORA))
    resumed.restore(tmp_path / "saved")
    batch = batch_of(straight, 1)
    assert straight.step(batch).metrics == resumed.step(batch).metrics
    assert torch.equal(weights(straight), weights(resumed))
    with pytest.raises(CheckpointError, match="does not fit this run's lora"):
        make(policy_file, optimizer=options(lora=LoraConfig(rank=3))).restore(tmp_path / "saved")


def test_adapters_of_layers_that_are_not_there_are_refused(policy_file: str) -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets \['nope'\]"):
        make(policy_file, optimizer=options(lora=LoraConfig(rank=2, targets=("nope",))))


@pytest.mark.parametrize("adamw", ["fused", "foreach"])
def test_every_implementation_of_adamw_steps_alike(policy_file: str, adamw: str) -> None:
    plain = make(policy_file, optimizer=options(lr=1e-4))
    other = make(policy_file, optimizer=options(lr=1e-4, adamw=adamw))
    for iteration in range(3):
        batch = batch_of(plain, iteration)
        plain.step(batch)
        other.step(batch)
    torch.testing.assert_close(weights(other), weights(plain), rtol=0, atol=1e-6)


def test_a_token_that_the_learners_filter_drops_is_seen_but_stops_nothing(policy_file: str) -> None:
    """A sampler that rounds otherwise may draw it: probability 0 here, ratio 0, no gradient."""
    spec = SamplingSpec(top_k=3)
    learner = make(policy_file, spec=spec)
    batch = batch_of(learner, spec=spec)
    policy = tiny_policy()
    logits = policy(torch.from_numpy(batch.tokens).long(), policy.encode(batch.conditions))
    batch.tokens[0, 8] = int(logits[0, 8].argmin())
    metrics = learner.step(batch).metrics
    assert metrics["policy/logprob_gap"] == math.inf
    assert torch.isfinite(weights(learner)).all()


def test_adapters_without_their_package_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'tessera-rl\[lora\]'"):
        LoraConfig(rank=1)
    LoraConfig(rank=0)  # nothing is needed for nothing
