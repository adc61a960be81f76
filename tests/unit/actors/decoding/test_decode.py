from __future__ import annotations

import numpy as np
import pytest
import torch

from actors.decoding.decode import decode_tokens, rollout_uniforms, token_logprobs
from actors.distribution import (
    filtered_logits,
    guided_logits,
    log_distribution,
    sample_tokens,
)
from actors.models.base import Conditions
from cluster.messages import RequestKey, SamplingSpec
from tests.unit.helpers import SPECS, TINY, tiny_policy

KEY = RequestKey("train", 5, 2)


def uniforms(rows: int) -> torch.Tensor:
    return torch.from_numpy(rollout_uniforms(11, KEY, rows, TINY.num_tokens))


def classes(*indices: int) -> Conditions:
    return Conditions(torch.tensor(indices))


@pytest.mark.parametrize("name", SPECS)
def test_cached_decoding_equals_teacher_forcing(name: str) -> None:
    policy, spec = tiny_policy(), SPECS[name]
    conditions = classes(0, 1, 2, 3, 0, 1)
    decoded = decode_tokens(policy, conditions, uniforms(6), spec)
    logprobs, entropies = token_logprobs(policy, decoded.tokens, conditions, spec)
    assert (decoded.logprobs - logprobs).abs().max() <= 1e-4
    assert (decoded.entropies - entropies).abs().max() <= 1e-4
    assert torch.isfinite(logprobs).all()


def test_distil_records_the_mixture_and_learns_the_conditional() -> None:
    policy, conditions = tiny_policy(), classes(0, 1, 2)
    distil = SamplingSpec(cfg_scale=2.0, guidance="distil")
    guided = SamplingSpec(cfg_scale=2.0, guidance="guided")
    decoded = decode_tokens(policy, conditions, uniforms(3), distil)
    same = decode_tokens(policy, conditions, uniforms(3), guided)
    assert torch.equal(decoded.tokens, same.tokens)
    assert torch.equal(decoded.logprobs, same.logprobs)
    learned, _ = token_logprobs(policy, decoded.tokens, conditions, distil)
    plain, _ = token_logprobs(policy, decoded.tokens, conditions, SamplingSpec())
    assert torch.equal(learned, plain)
    assert (learned - decoded.logprobs).abs().max() > 0.1


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_draws_do_not_depend_on_batch_placement(batch: int) -> None:
    policy, conditions, draws = tiny_policy(), Conditions(torch.arange(28) % 4), uniforms(28)
    whole = decode_tokens(policy, conditions, draws, SamplingSpec()).tokens
    parts = [
        decode_tokens(policy, conditions[at : at + batch], draws[at : at + batch], SamplingSpec())
        for at in range(0, 28, batch)
    ]
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole)


def test_decoding_does_not_change_the_policy() -> None:
    policy = tiny_policy()
    names = set(policy.state_dict())
    decode_tokens(policy, classes(1), uniforms(1), SamplingSpec())
    assert set(policy.state_dict()) == names
    policy.train()
    tokens = torch.zeros(1, TINY.num_tokens, dtype=torch.long)
    in_train_mode = policy(tokens, classes(1))
    assert torch.equal(in_train_mode, policy.eval()(tokens, classes(1)))


def test_uniforms_are_a_function_of_identity() -> None:
    draws = rollout_uniforms(1, KEY, 4, 9)
    assert draws.shape == (4, 9)
    assert draws.dtype == np.float64
    assert ((draws >= 0) & (draws < 1)).all()
    assert np.array_equal(rollout_uniforms(1, KEY, 2, 9), draws[:2])  # fewer rollouts, same ones
    assert np.array_equal(rollout_uniforms(1, KEY, 4, 5), draws[:, :5])
    others = [
        rollout_uniforms(2, KEY, 4, 9),
        rollout_uniforms(1, KEY._replace(stream="evaluate"), 4, 9),
        rollout_uniforms(1, KEY._replace(iteration=6), 4, 9),
        rollout_uniforms(1, KEY._replace(group=3), 4, 9),
    ]
    for other in others:
        assert not np.intersect1d(other, draws).size


def test_uniforms_never_change() -> None:
    """Committed values: a change here would change every recorded run."""
    draws = rollout_uniforms(0, RequestKey("train", 0, 0), 2, 2)
    assert draws.tolist() == [
        [0.39454441109932903, 0.23637263378790974],
        [0.7965269639147382, 0.1826828071559634],
    ]


def test_sampling_follows_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    draws = torch.linspace(0, 1, 10001, dtype=torch.float64)[:-1]
    tokens = sample_tokens(probabilities.log().expand(10000, -1), draws)
    shares = torch.bincount(tokens, minlength=4) / 10000
    assert (shares - probabilities).abs().max() < 1e-3


def test_sampling_never_draws_a_token_of_probability_zero() -> None:
    logp = torch.tensor([[-torch.inf, 0.2, -torch.inf, 0.4, -torch.inf]]).log_softmax(-1)
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample_tokens(logp.expand(2, -1), edges).tolist() == [1, 3]


def test_top_k_keeps_ties() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0]])
    kept = filtered_logits(logits, SamplingSpec(top_k=2)) > -torch.inf
    assert kept.tolist() == [[True, False, True, True]]


def test_top_p_keeps_the_token_that_crosses() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for p, count in ((0.4, 1), (0.6, 2), (0.81, 3), (0.96, 4)):
        kept = filtered_logits(logits, SamplingSpec(top_p=p)) > -torch.inf
        assert kept.sum() == count


def test_temperature_comes_before_the_filters() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    hot = SamplingSpec(temperature=1e3, top_p=0.6)  # almost uniform: 0.6 takes three of four
    assert (filtered_logits(logits, hot) > -torch.inf).sum() == 3


def test_entropy_of_a_filtered_distribution_and_its_gradient() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().requires_grad_()
    _, entropy = log_distribution(logits, SamplingSpec(top_k=2))
    p = np.array([0.5, 0.3]) / 0.8
    assert entropy.item() == pytest.approx(-(p * np.log(p)).sum(), abs=1e-6)
    entropy.backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 2:].abs().max() == 0


def test_guidance_formula() -> None:
    conditional, unconditional = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])
    assert guided_logits(conditional, unconditional, 2.0).tolist() == [1.5, 1.0]
    assert torch.equal(guided_logits(conditional, unconditional, 1.0), conditional)


def test_guided_gradient_flows_through_both_branches() -> None:
    """Finite differences on the class table: the asked class's row, and the null class's."""
    policy = tiny_policy().double()
    spec = SamplingSpec(cfg_scale=1.5, guidance="guided")
    tokens, conditions = torch.randint(0, 20, (2, TINY.num_tokens)), classes(1, 1)
    table = policy.cls_embedding.embedding_table.weight.requires_grad_()

    def total() -> torch.Tensor:
        return token_logprobs(policy, tokens, conditions, spec)[0].sum()

    total().backward()
    for row in (1, TINY.num_classes):
        with torch.no_grad():
            step = 1e-4  # logits are fp32, as in production
            table[row, 0] += step
            above = total()
            table[row, 0] -= 2 * step
            below = total()
            table[row, 0] += step
        numeric = float(above - below) / (2 * step)
        assert table.grad[row, 0].item() == pytest.approx(numeric, rel=0.05, abs=0.05)
        assert abs(table.grad[row].abs().max().item()) > 0.01
