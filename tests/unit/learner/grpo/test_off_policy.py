"""Importance weights and masks, by hand."""

from __future__ import annotations

import pytest
import torch

from learner.grpo.loss import LossConfig, grpo_loss
from learner.grpo.off_policy import (
    kept_weights,
    kept_weights_of_sequences,
    tokens_in_band,
    truncated_weights,
)

RATIOS = torch.tensor([[1.0, 4.0, 0.25, 1.5], [0.5, 2.0, 1.0, 1.0]])
BEHAVIOUR = torch.full((2, 4), -3.0)
PROXIMAL = BEHAVIOUR + RATIOS.log()


def test_weights_are_cut_from_above_alone() -> None:
    found = truncated_weights(PROXIMAL, BEHAVIOUR, cap=2.0)
    expected = torch.tensor([[1.0, 2.0, 0.25, 1.5], [0.5, 2.0, 1.0, 1.0]])
    torch.testing.assert_close(found, expected)


def test_weights_carry_no_gradient() -> None:
    proximal = PROXIMAL.clone().requires_grad_(True)
    assert not truncated_weights(proximal, BEHAVIOUR, cap=2.0).requires_grad


def test_weights_of_rollouts_are_of_geometric_means() -> None:
    found = truncated_weights(PROXIMAL, BEHAVIOUR, cap=1.05, sequence=True)
    torch.testing.assert_close(found, torch.tensor([[1.05], [1.0]]))  # 1.5^(1/4) = 1.107, cut


def test_uncut_weights_are_unbiased() -> None:
    """E_behaviour[w f] = E_proximal[f], over a vocabulary of three."""
    p, b, f = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.5, 0.3, 0.2]), torch.arange(3.0)
    weights = truncated_weights(p.log()[None], b.log()[None], cap=100.0)[0]
    torch.testing.assert_close((b * weights * f).sum(), (p * f).sum())


@pytest.mark.parametrize(
    ("low", "high", "kept"),
    [
        (0.5, 2.0, [[1, 0, 0, 1], [1, 1, 1, 1]]),
        (0.0, 1.4, [[1, 0, 1, 0], [1, 0, 1, 1]]),
        (0.9, float("inf"), [[1, 1, 0, 1], [0, 1, 1, 1]]),
    ],
)
def test_a_band_leaves_out_what_it_says(low: float, high: float, kept: list) -> None:
    # Bounds belong to the band, but for the rounding of exp(log 2).
    found = tokens_in_band(PROXIMAL, BEHAVIOUR, low - 1e-6, high + 1e-6)
    assert found.tolist() == [[bool(value) for value in row] for row in kept]


def gradient(weights: torch.Tensor) -> torch.Tensor:
    logprobs = BEHAVIOUR.clone().requires_grad_(True)
    advantages = torch.tensor([1.0, -2.0])
    loss, _ = grpo_loss(
        logprobs, torch.ones(2, 4), BEHAVIOUR, advantages, None, 0.0, LossConfig(), weights=weights
    )
    loss.backward()
    return logprobs.grad


def test_masked_tokens_have_no_gradient_and_the_others_a_mean_of_their_own() -> None:
    kept = torch.tensor([[1, 0, 0, 1], [1, 1, 1, 0]], dtype=torch.bool)
    by_token = gradient(kept_weights(kept, kept.float().mean().item()))
    torch.testing.assert_close(
        by_token, torch.tensor([[-0.2, 0, 0, -0.2], [0.4, 0.4, 0.4, 0]])
    )  # 5 kept tokens
    by_rollout = gradient(kept_weights_of_sequences(kept))
    torch.testing.assert_close(
        by_rollout, torch.tensor([[-0.25, 0, 0, -0.25], [1 / 3, 1 / 3, 1 / 3, 0]])
    )
    constant = gradient(kept.float())  # Dr.GRPO: what is dropped goes to nobody
    torch.testing.assert_close(
        constant, torch.tensor([[-0.125, 0, 0, -0.125], [0.25, 0.25, 0.25, 0]])
    )


def test_nothing_kept_is_no_gradient() -> None:
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    assert gradient(kept_weights(nothing, 0.0)).abs().max() == 0
    assert gradient(kept_weights_of_sequences(nothing)).abs().max() == 0
