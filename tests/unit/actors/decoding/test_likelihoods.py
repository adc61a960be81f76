"""Likelihoods in pieces: what the whole pass gives, in less memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from actors.decoding import decode
from actors.decoding.decode import positions_at_once, token_likelihoods
from actors.models.base import Conditions, PolicyModule
from actors.models.llamagen import LlamaGenConfig
from actors.models.taming import TamingConfig, TamingGPT
from cluster.messages import SamplingSpec
from tests.unit.helpers import SPECS, TINY, random_policy, tiny_policy

ROWS = 5


def tiny_taming() -> PolicyModule:
    torch.manual_seed(0)
    config = TamingConfig(
        dim=32, num_layers=2, num_heads=2, vocab_size=20, block_size=9, grid=3, num_classes=4
    )
    policy: PolicyModule = TamingGPT(config).eval()
    return policy


def of(
    policy: PolicyModule, spec: SamplingSpec, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The three likelihoods stacked, and gradients that go through each."""
    policy.requires_grad_(True).zero_grad()
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 20, (ROWS, policy.num_tokens), generator=generator)
    classes = torch.arange(ROWS) % 4
    conditions = Conditions(
        classes if isinstance(policy.config, LlamaGenConfig) else classes[:, None]
    )
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        found = token_likelihoods(policy, tokens, conditions, spec)
    inside = found.logprobs.masked_fill(found.logprobs == -torch.inf, 0)
    (inside.sum() - 0.3 * found.entropies.sum() + 0.2 * found.unfiltered.square().sum()).backward()
    gradients = {
        name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None
    }
    return torch.stack(found).detach(), gradients


@pytest.mark.parametrize("name", [*SPECS, "taming", "bf16"])
def test_pieces_are_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy: PolicyModule = tiny_taming() if name == "taming" else tiny_policy()
    spec = SPECS.get(name, SamplingSpec())
    dtype = torch.bfloat16 if name == "bf16" else None
    expected, theirs = of(policy, spec, dtype)
    monkeypatch.setattr(decode, "LOGITS_AT_ONCE", 7 * policy.vocab_size)  # 45 tokens: 7, ..., 3
    calls: list = []
    monkeypatch.setattr(decode, "_likelihoods", counting(decode._likelihoods, calls))
    found, ours = of(policy, spec, dtype)
    size = positions_at_once(policy.vocab_size, guided=spec.guided_sampling)
    assert size == (3 if spec.guided_sampling else 7)
    assert len(calls) == 2 * -(-45 // size)  # forward, and again for the backward pass
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert ours.keys() == theirs.keys() == dict(policy.named_parameters()).keys()
    bound = 1e-2 if dtype else 1e-5
    for parameter, gradient in theirs.items():
        scale = gradient.abs().max()
        gap = (ours[parameter] - gradient).abs().max()
        assert gap <= bound * scale + 1e-6, parameter  # keys' biases have no gradient


def counting(function: Callable, calls: list) -> Callable:
    def counted(*arguments: object) -> object:
        calls.append(arguments)
        return function(*arguments)

    return counted


def test_one_piece_is_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Miniature-sized passes are not cut, and nothing is computed again."""
    calls: list = []
    monkeypatch.setattr(decode, "_likelihoods", counting(decode._likelihoods, calls))
    of(tiny_policy(), SamplingSpec())
    assert len(calls) == 1


@pytest.mark.parametrize("guided", [False, True])
def test_pieces_keep_hidden_states_only(guided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between forward and backward no logits are alive; at any time, a piece's at most."""
    config = LlamaGenConfig(
        dim=8, num_layers=1, num_heads=2, grid=4, vocab_size=8192, num_classes=4
    )
    policy = random_policy(config).requires_grad_(True)
    tokens = torch.zeros(6, config.num_tokens, dtype=torch.long)
    conditions = Conditions(torch.zeros(6, dtype=torch.long))
    spec = SPECS["guided"] if guided else SamplingSpec()
    logits = 4 * tokens.numel() * config.vocab_size  # bytes

    def kept() -> int:
        """Bytes that autograd saves of logits' size and shape; weights are smaller."""
        storages: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = token_likelihoods(policy, tokens, conditions, spec)
        assert found.logprobs.requires_grad
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    whole = kept()
    monkeypatch.setattr(decode, "LOGITS_AT_ONCE", 16 * config.vocab_size)
    pieces = kept()
    assert whole > 2 * logits
    assert pieces < whole - 2 * logits * 0.99
    assert pieces < 0.5 * logits
    largest = 0

    def watch(logits: torch.Tensor, *rest: object) -> object:
        nonlocal largest
        largest = max(largest, logits.numel())
        return original(logits, *rest)

    original = decode._likelihoods
    monkeypatch.setattr(decode, "_likelihoods", watch)
    token_likelihoods(policy, tokens, conditions, spec).logprobs.sum().backward()
    assert largest == 16 * config.vocab_size


def test_passes_without_gradients_come_in_pieces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, tokens = tiny_policy(), torch.zeros(ROWS, TINY.num_tokens, dtype=torch.long)
    conditions = Conditions(torch.zeros(ROWS, dtype=torch.long))
    with torch.no_grad():
        expected = token_likelihoods(policy, tokens, conditions, SamplingSpec())
        monkeypatch.setattr(decode, "LOGITS_AT_ONCE", 100)
        found = token_likelihoods(policy, tokens, conditions, SamplingSpec())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not found.logprobs.requires_grad
