from __future__ import annotations

import math

import pytest
import torch

from learner.entropy import EntropyConfig, initial_coefficient, next_coefficient
from learner.loss import LossConfig, clipped_surrogate, grpo_loss, k3

CONFIG = LossConfig(clip_low=0.2, clip_high=0.3)


def loss_of(logprobs, behaviour, advantages, *, reference=None, entropy_coef=0.0, config=CONFIG):
    entropies = torch.full_like(logprobs, 1.5)
    return grpo_loss(logprobs, entropies, behaviour, advantages, reference, entropy_coef, config)


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


def test_k3_is_its_definition_and_unbiased() -> None:
    logp, logq = torch.tensor([0.2, 0.3, 0.5]).log(), torch.tensor([0.5, 0.25, 0.25]).log()
    q_over_p = (logq - logp).exp()
    torch.testing.assert_close(k3(logp, logq), q_over_p - q_over_p.log() - 1)
    exact = (logp.exp() * (logp - logq)).sum()
    torch.testing.assert_close((logp.exp() * k3(logp, logq)).sum(), exact)
    assert (k3(logp, logq) >= 0).all()


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


@pytest.mark.parametrize("fields", [{"clip_low": 1.0}, {"clip_high": -0.1}, {"kl_coef": -1.0}])
def test_impossible_settings_are_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        LossConfig(**fields)


def test_target_controller_steers_towards_the_base_entropy() -> None:
    config = EntropyConfig(controller="target", gain=0.1, max_coef=0.05)
    assert next_coefficient(config, 0.01, entropy=2.0, base_entropy=2.5) == pytest.approx(0.03)
    assert next_coefficient(config, 0.01, entropy=2.6, base_entropy=2.5) == pytest.approx(0.006)
    assert next_coefficient(config, 0.04, entropy=1.0, base_entropy=2.5) == 0.05
    assert next_coefficient(config, 0.001, entropy=5.0, base_entropy=2.5) == 0.0


def test_other_controllers_keep_still() -> None:
    fixed = EntropyConfig(controller="fixed", coef=0.02)
    assert initial_coefficient(fixed) == next_coefficient(fixed, 0.02, 1.0, 2.0) == 0.02
    assert initial_coefficient(EntropyConfig(controller="none", coef=0.02)) == 0.0
