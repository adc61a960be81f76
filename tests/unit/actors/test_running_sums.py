"""What replaces `cumsum` under deterministic algorithms on a GPU, on the CPU against `cumsum`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from actors import running_sums
from actors.distribution import filtered_logits, sample_tokens
from actors.models.llamagen import CaptionRows
from cluster.messages import SamplingSpec


def logprobs(rows: int = 8, vocabulary: int = 1000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, vocabulary, generator=generator)
    logits[:, ::3] = -torch.inf
    return logits.log_softmax(-1)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_sums, "_refused", lambda x: True)


def test_sums_of_probabilities_are_exact_in_any_order() -> None:
    probabilities = logprobs().exp()
    sums = running_sums.fixed_point_sums(probabilities)
    torch.testing.assert_close(
        sums, probabilities.cumsum(-1, dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert (sums.diff(dim=-1) >= 0).all()
    halves = [running_sums.fixed_point_sums(half) for half in probabilities.chunk(2, -1)]
    assert torch.equal(torch.cat([halves[0], halves[0][:, -1:] + halves[1]], -1), sums)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_same_tokens_are_drawn() -> None:
    logp = logprobs(256)
    uniforms = torch.rand(256, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    uniforms[:2] = torch.tensor([0.0, 1 - 2.0**-53])
    drawn = sample_tokens(logp, uniforms)
    assert logp.gather(-1, drawn[:, None]).isfinite().all()
    cumulative = logp.exp().cumsum(-1, dtype=torch.float64)
    expected = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    assert torch.equal(drawn[2:], expected[2:, 0])


@pytest.mark.parametrize("top_p", [0.3, 0.9])
def test_top_p_keeps_the_same_tokens(top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, spec = 2 * torch.randn(4, 7, 500), SamplingSpec(top_p=top_p)
    plain = filtered_logits(logits, spec)
    monkeypatch.setattr(running_sums, "_refused", lambda x: True)
    assert torch.equal(filtered_logits(logits, spec), plain)


@pytest.mark.parametrize("autocast", [False, True])
def test_sums_of_captions_and_their_gradients(autocast: bool) -> None:
    """Also under autocast, which would round the product's operands."""
    rows = torch.randn(3, 120, 16, requires_grad=True)
    weights = torch.randn(3, 120, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, plain = running_sums.triangular_sums(rows), rows.cumsum(1)
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad((sums * weights).sum(), rows)[0] for sums in (found, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_counts_of_captions_tokens() -> None:
    mask = torch.tensor([[False, True, True], [True, True, True]])
    rows = CaptionRows(torch.zeros(2, 3, 4), mask, torch.tensor([0, 1]))
    assert rows._counts.dtype == torch.float32
    assert rows._counts[..., 0].tolist() == [[1, 1, 2], [1, 2, 3]]
