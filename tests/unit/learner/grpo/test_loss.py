from __future__ import annotations

import math

import pytest
import torch

from learner.grpo.kl import divergence, k1, k2, k3, penalised_advantages
from learner.grpo.loss import LossConfig, clipped_surrogate, grpo_loss, sequence_ratio

CONFIG = LossConfig(clip_low=0.2, clip_high=0.3)


def loss_of(
    logprobs, behaviour, advantages, *, reference=None, entropy_coef=0.0, config=CONFIG, **more
):
    entropies = torch.full_like(logprobs, 1.5)
    return grpo_loss(
        logprobs, entropies, behaviour, advantages, reference, entropy_coef, config, **more
    )


def test_at_ratio_one_the_gradient_is_reinforce() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 6, requires_grad=True)
    tokens, advantages = torch.randint(0, 6, (3, 4)), torch.tensor([1.0, -0.5, 2.0])
    logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    loss_of(logprobs, logprobs.detach(), advantages)[0].backward()
    found = logits.grad.clone()
    logits.grad = None
    again = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    (-(advantages[:, None] * again).mean()).backward()
    torch.testing.assert_close(found, logits.grad)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "has_gradient"),
    [
        (1.1, 2.0, -2.2, True),
        (1.5, 2.0, -2.6, False),  # above 1.3, gaining: cut off
        (0.5, 2.0, -1.0, True),  # below 0.8, losing what is good: must come back
        (1.5, -2.0, 3.0, True),  # above 1.3, growing what is bad: must come back
        (0.5, -2.0, 1.6, False),  # below 0.8, already falling: cut off
        (0.9, -2.0, 1.8, True),
    ],
)
def test_the_clip_binds_on_the_right_side(
    ratio: float, advantage: float, value: float, has_gradient: bool
) -> None:
    x = torch.tensor([[ratio]], requires_grad=True)
    surrogate = clipped_surrogate(x, torch.tensor([[advantage]]), 0.2, 0.3)
    surrogate.sum().backward()
    assert surrogate.item() == pytest.approx(value)
    assert x.grad.item() == pytest.approx(-advantage if has_gradient else 0.0)


def test_clip_fraction_counts_tokens_without_gradient() -> None:
    behaviour = torch.zeros(2, 2)
    logprobs = torch.tensor([[1.5, 1.0], [0.5, 0.7]]).log()
    _, stats = loss_of(logprobs, behaviour, torch.tensor([1.0, -1.0]))
    assert stats.clip_fraction == pytest.approx(3 / 4)
    assert stats.logprob_gap == pytest.approx(math.log(2))


P, Q = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.5, 0.25, 0.25])
KL = (P * (P / Q).log()).sum()


def test_kl_estimators_are_their_definitions() -> None:
    logp, logq = P.log(), Q.log()
    torch.testing.assert_close(k1(logp, logq), (P / Q).log())
    torch.testing.assert_close(k2(logp, logq), (P / Q).log() ** 2 / 2)
    torch.testing.assert_close(k3(logp, logq), Q / P - (Q / P).log() - 1)
    assert (k3(logp, logq) >= 0).all()


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    logp, logq = P.log(), Q.log()
    torch.testing.assert_close((P * k1(logp, logq)).sum(), KL)
    torch.testing.assert_close((P * k3(logp, logq)).sum(), KL)
    assert abs((P * k2(logp, logq)).sum() - KL) > 0.005


def test_what_the_gradient_of_each_estimator_is() -> None:
    """Expectations over the policy's own draws: of k1 nothing, of k2 the KL's own gradient."""
    logits = P.log().clone().requires_grad_(True)

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    logp, logq = logits.log_softmax(-1), Q.log()
    exact = gradient((logp.exp() * (logp - logq)).sum())
    expected = {
        name: gradient((logp.detach().exp() * estimator(logp, logq)).sum())
        for name, estimator in (("k1", k1), ("k2", k2), ("k3", k3))
    }
    assert expected["k1"].abs().max() < 1e-7
    torch.testing.assert_close(expected["k2"], exact)
    assert not torch.allclose(expected["k3"], exact, atol=1e-2)


def test_kl_of_sequences_is_of_length_normalised_logprobs() -> None:
    logprobs, reference = torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -2.5]])
    d = (-2.25) - (-2.0)  # log q - log p, of means
    found = divergence(logprobs, reference, "k3", "sequence")
    torch.testing.assert_close(found, torch.tensor([[math.exp(d) - d - 1]]))
    torch.testing.assert_close(
        divergence(logprobs, reference, "k1", "token"), torch.tensor([[1.0, -0.5]])
    )


def test_kl_in_the_reward_by_hand() -> None:
    advantages = torch.tensor([[1.0], [-1.0]])
    estimates = torch.tensor([[0.2, 0.4], [0.0, 0.2]])
    found = penalised_advantages(advantages, estimates, coef=2.0, baseline=0.2)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.6], [-0.6, -1.0]]))


def test_k1_in_the_reward_and_k2_in_the_loss_have_one_gradient() -> None:
    """At ratio 1, without the baseline that changes no expectation."""
    torch.manual_seed(0)
    start, reference = -torch.rand(2, 3), -torch.rand(2, 3)
    in_loss = start.clone().requires_grad_(True)
    config = LossConfig(kl_coef=0.7, kl_estimator="k2")
    loss_of(in_loss, start, torch.zeros(2), reference=reference, config=config)[0].backward()
    in_reward = start.clone().requires_grad_(True)
    advantages = penalised_advantages(torch.zeros(2, 1), k1(start, reference), 0.7, 0.0)
    loss_of(in_reward, start, advantages)[0].backward()
    torch.testing.assert_close(in_reward.grad, in_loss.grad)


def test_terms_add_up() -> None:
    logprobs, behaviour = torch.full((2, 3), -1.0), torch.full((2, 3), -1.0)
    reference = torch.full((2, 3), -1.5)
    config = LossConfig(kl_coef=0.5)
    loss, stats = loss_of(
        logprobs,
        behaviour,
        torch.tensor([1.0, 3.0]),
        reference=reference,
        entropy_coef=0.1,
        config=config,
    )
    kl = math.exp(-0.5) + 0.5 - 1
    assert loss.item() == pytest.approx(-2.0 + 0.5 * kl - 0.1 * 1.5)
    assert stats.reference_kl == pytest.approx(kl)
    assert stats.mismatch_kl == 0


def test_zero_advantages_give_zero_gradient() -> None:
    logprobs = torch.full((2, 3), -1.0, requires_grad=True)
    loss_of(logprobs, torch.full((2, 3), -1.2), torch.zeros(2))[0].backward()
    assert logprobs.grad.abs().max() == 0


def test_sequence_ratio_is_the_geometric_mean() -> None:
    """GSPO: every token of a rollout has its ratio, gradient and fate."""
    ratios = torch.tensor([[2.0, 0.5, 1.0, 1.0], [1.2, 1.2, 1.2, 1.2]])
    logprobs = ratios.log().requires_grad_(True)
    found = sequence_ratio(logprobs, torch.zeros(2, 4))
    torch.testing.assert_close(found, torch.tensor([[1.0], [1.2]]))
    config = LossConfig(aggregation="sequence-ratio", clip_low=0.1, clip_high=0.1)
    advantages = torch.tensor([1.0, 1.0])
    loss, stats = loss_of(logprobs, torch.zeros(2, 4), advantages, config=config)
    loss.backward()
    assert loss.item() == pytest.approx(-(1.0 + 1.1) / 2)
    expected = torch.tensor([[-1 / 8] * 4, [0.0] * 4])  # -A s_b / T / B, or cut off
    torch.testing.assert_close(logprobs.grad, expected)
    assert stats.clip_fraction == 0.5


def test_dr_grpo_is_the_token_mean_times_a_constant() -> None:
    """The sum over T tokens over 8, and the mean over rollouts: T / 8 times the token mean."""
    logprobs, behaviour = torch.full((2, 3), -1.0), torch.full((2, 3), -1.1)
    reference, advantages = torch.full((2, 3), -1.4), torch.tensor([1.0, -3.0])
    config = LossConfig(kl_coef=0.5, length_divisor=8, clip_high=0.3)
    found = loss_of(
        logprobs, behaviour, advantages, reference=reference, entropy_coef=0.1, config=config
    )[0]
    kl, ratio = math.exp(-0.4) + 0.4 - 1, math.exp(0.1)
    sums = [3 * (-ratio * a + 0.5 * kl - 0.1 * 1.5) / 8 for a in (1.0, -3.0)]
    assert found.item() == pytest.approx(sum(sums) / 2)


def test_the_ratio_may_be_to_another_policy_than_the_one_that_drew() -> None:
    logprobs = torch.tensor([[-1.0, -1.0]])
    loss, stats = loss_of(
        logprobs,
        torch.tensor([[-2.0, -2.0]]),
        torch.tensor([1.0]),
        old=logprobs - 0.1,
        weights=torch.tensor([[0.5, 2.0]]),
    )
    assert loss.item() == pytest.approx(-math.exp(0.1) * 1.25)
    assert stats.ratio == pytest.approx(math.exp(0.1))
    assert stats.logprob_gap == pytest.approx(1.0)  # to the behaviour policy still


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clip_low": 1.0}, "clip_low"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"importance_cap": 2.0}, "needs ratio_to 'proximal'"),
        ({"mask_low": 2.0, "mask_high": 1.0}, "must be a band"),
        ({"mask_high": 2.0, "aggregation": "sequence-ratio"}, "one ratio a rollout"),
        ({"length_divisor": 16, "aggregation": "seq-mean"}, "goes with aggregation 'token-mean'"),
    ],
)
def test_impossible_settings_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**fields)
