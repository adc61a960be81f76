"""Learning under top-k and top-p: with every KL, entropy controller and guidance, updates happen.

A drawn token may have probability 0 under a filter: in the reference, whose top-k is another one,
and in the learner itself after its first update. No such token may cost an update.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from actors.decoding.decode import token_likelihoods
from cluster.messages import Condition, SamplingSpec
from learner.grpo.entropy import EntropyConfig
from learner.grpo.loss import LossConfig, grpo_loss
from learner.grpo.off_policy import mean_log_ratio, truncated_weights
from learner.training.data_parallel import DataParallelGroup
from learner.training.optimizer import OptimizerConfig
from learner.training.preparation import ForwardPasses
from learner.training.skips import not_finite_because
from tests.unit.helpers import TINY, random_policy, tiny_policy
from tests.unit.learner.training.test_policy import trained
from tests.unit.learner_cases import batch_of, make, tiny_policy_file, weights

FILTERS = {
    "none": {},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.6},
    "both": {"top_k": 6, "top_p": 0.7},
}
GUIDANCES = {
    "none": {},
    "guided": {"guidance": "guided", "cfg_scale": 2.0},
    "distil": {"guidance": "distil", "cfg_scale": 2.0},
}
KLS = [LossConfig()] + [
    LossConfig(kl_coef=0.5, kl_estimator=estimator, kl_in=place)
    for estimator, place in itertools.product(("k1", "k2", "k3"), ("loss", "reward"))
]
ENTROPIES = [
    EntropyConfig(controller="fixed", coef=0.01),
    EntropyConfig(controller="target", coef=0.01),
    EntropyConfig(controller="paper"),
]
STEPS = 2
COMPARED = ("policy/mismatch_kl", "policy/logprob_gap")
"""With the sampler: infinite where a filter drops what it drew."""


@pytest.fixture(scope="module")
def policy_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_policy_file(tmp_path_factory.mktemp("policy"))


def spec_of(filters: str, guidance: str = "none") -> SamplingSpec:
    return SamplingSpec(temperature=0.9, **FILTERS[filters], **GUIDANCES[guidance])


@pytest.mark.parametrize("shift", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("filters", FILTERS)
def test_every_kl_and_entropy_learns_under_every_filter_and_guidance(
    policy_file: str, filters: str, guidance: str, shift: int
) -> None:
    """Each KL with one of the entropies; the three shifts together are all pairs."""
    spec = spec_of(filters, guidance)
    two = OptimizerConfig(lr=1e-2, microbatch=8, updates_per_iteration=2)
    for number, loss in enumerate(KLS):
        entropy = ENTROPIES[(number + shift) % len(ENTROPIES)]
        case = f"{loss.kl_estimator} {loss.kl_coef:g} in {loss.kl_in}, {entropy.controller}"
        learner = make(policy_file, spec=spec, optimizer=two, loss=loss, entropy=entropy)
        learner.start(2.0)
        for iteration in range(STEPS):
            before = weights(learner)
            metrics = learner.step(batch_of(learner, iteration, rows=4, spec=spec)).metrics
            assert metrics["guards/skipped_updates"] == 0, case
            found = {name: value for name, value in metrics.items() if name not in COMPARED}
            assert all(map(math.isfinite, found.values())), (case, found)
            after = weights(learner)
            assert torch.isfinite(after).all(), case
            assert (after - before).abs().max() > 1e-3, case
            assert ("policy/reference_kl" in metrics) == (loss.kl_coef > 0), case
        if loss.kl_coef and loss.kl_estimator != "k1":
            assert metrics["policy/reference_kl"] > 1e-6, case


@pytest.mark.parametrize("filters", ["top_k", "top_p", "both"])
@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(aggregation="sequence-ratio", kl_coef=0.5, kl_level="sequence"),
        LossConfig(ratio_to="proximal", importance_cap=2.0, kl_coef=0.5),
        LossConfig(ratio_to="proximal", aggregation="sequence-ratio", importance_cap=2.0),
        LossConfig(ratio_to="proximal", mask_low=0.1, mask_high=10, kl_in="reward", kl_coef=0.5),
        LossConfig(aggregation="seq-mean", mask_low=0.1),
    ],
    ids=lambda loss: f"{loss.aggregation}, {loss.ratio_to}, masks {loss.masks}",
)
def test_rollouts_of_another_policy_are_learned_from_under_filters(
    policy_file: str, filters: str, loss: LossConfig
) -> None:
    """Drawn one version earlier, so that tokens lie outside the learner's filter before the first
    update (proximal -inf) and come back into it, or fall out, after it."""
    spec = spec_of(filters)
    options = OptimizerConfig(lr=3e-2, microbatch=4, updates_per_iteration=2)
    learner = make(policy_file, spec=spec, optimizer=options, loss=loss, max_staleness=1)
    stale, outside = batch_of(learner, spec=spec), False
    for iteration in range(1, STEPS + 1):
        fresh = batch_of(learner, iteration, spec=spec)
        before = weights(learner)
        metrics = learner.step(stale).metrics
        outside |= metrics["policy/logprob_gap"] == math.inf
        assert metrics["guards/skipped_updates"] == 0
        assert (weights(learner) - before).abs().max() > 1e-3
        stale = fresh
    assert outside  # else the test shows nothing


def test_the_kl_takes_both_logprobs_before_the_filter_and_after_temperature() -> None:
    policy = random_policy(TINY)
    tokens = torch.arange(36).view(4, 9) % TINY.vocab_size
    given = policy.encode([Condition(text="", class_index=row) for row in range(4)])
    for guidance, filters in itertools.product(GUIDANCES, ("top_k", "top_p", "both")):
        spec = spec_of(filters, guidance)
        found = token_likelihoods(policy, tokens, given, spec)
        plain = token_likelihoods(policy, tokens, given, spec.unfiltered())
        assert (found.logprobs == -math.inf).any()
        assert torch.isfinite(found.unfiltered).all()
        torch.testing.assert_close(found.unfiltered, plain.logprobs)
    unfiltered = token_likelihoods(policy, tokens, given, SamplingSpec(temperature=0.5))
    assert unfiltered.unfiltered is unfiltered.logprobs  # without filters: the very numbers


def test_the_references_logprobs_are_unfiltered(policy_file: str) -> None:
    spec = spec_of("top_k")
    batch = batch_of(make(policy_file, spec=spec), spec=spec)
    batch.tokens[:] = np.arange(batch.tokens.size).reshape(batch.tokens.shape) % TINY.vocab_size
    own = trained(policy_file, reference=True)
    passes = ForwardPasses(own, LossConfig(kl_coef=1.0), spec, 8, DataParallelGroup())
    prepared, _ = passes.prepare(batch, proximal=False)
    policy = tiny_policy()
    expected = token_likelihoods(
        policy, prepared.tokens, policy.encode(batch.conditions), spec.unfiltered()
    )
    torch.testing.assert_close(prepared.reference, expected.logprobs)


def test_a_token_of_probability_zero_has_ratio_zero_and_no_gradient() -> None:
    inf = math.inf
    for ratio_to, old in (("behaviour", None), ("proximal", [[-1.0, -inf, -inf, -1.0]])):
        logprobs = torch.tensor([[-1.0, -inf, -2.0, -inf]], requires_grad=True)
        loss, stats = grpo_loss(
            logprobs,
            torch.zeros(1, 4),
            torch.full((1, 4), -1.0),
            torch.tensor([-1.0]),
            None,
            0.0,
            LossConfig(ratio_to=ratio_to),
            old=None if old is None else torch.tensor(old),
        )
        loss.backward()
        assert torch.isfinite(loss)
        assert logprobs.grad[0, 0] == pytest.approx(0.25)
        assert logprobs.grad[0, 1] == logprobs.grad[0, 3] == 0
        assert stats.ratio == pytest.approx((1 + (math.exp(-1) if old is None else 0)) / 4)


def test_one_dropped_token_does_not_take_the_ratio_of_its_rollout() -> None:
    gap = torch.tensor([[0.3, -math.inf, 0.5], [0.0, 0.0, 0.3]])
    torch.testing.assert_close(mean_log_ratio(gap), torch.tensor([[0.8 / 3], [0.1]]))
    weights = truncated_weights(gap, torch.zeros_like(gap), 5.0, sequence=True)
    torch.testing.assert_close(weights, torch.tensor([[0.8 / 3], [0.1]]).exp())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"entropy": math.nan, "surrogate": math.nan, "grad_norm": math.nan}, "own logits"),
        ({"reference_kl": math.inf, "grad_norm": math.nan}, "KL to the base policy overflows"),
        ({"real_ce": math.inf}, "real.source"),
        ({"surrogate": math.inf}, "ratio of learner to behaviour"),
        ({"grad_norm": math.inf}, "its gradient is not"),
    ],
)
def test_the_advice_names_what_is_not_finite(wrong: dict, said: str) -> None:
    fine = {"entropy": 2.0, "surrogate": 0.1, "grad_norm": 1.0}
    assert said in not_finite_because({**fine, **wrong})


def test_a_policy_that_draws_one_token_only_is_no_target_of_entropy(policy_file: str) -> None:
    """top_k 1: the base policy's entropy is 0, and the controllers' formula would divide by it."""
    spec = dataclasses.replace(spec_of("none"), top_k=1)
    entropy = EntropyConfig(controller="target", coef=0.01)
    learner = make(policy_file, spec=spec, entropy=entropy)
    learner.start(0.0)
    metrics = learner.step(batch_of(learner, spec=spec)).metrics
    assert metrics["policy/entropy_coef"] == 0.01
    assert metrics["guards/skipped_updates"] == 0
