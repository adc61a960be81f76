"""Batches of several sizes share a workspace: one memory, captured steps that stay, a bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actors.decoding import steps
from actors.decoding.decode import Decoded, decode_tokens
from actors.decoding.steps import StaticStep, Workspace
from actors.models.llamagen import LlamaGen
from cluster.errors import NotFiniteError
from cluster.messages import Condition, SamplingSpec
from tests.unit.helpers import SPECS, tiny_policy

PLAIN = SPECS["plain"]


def decode(
    policy: LlamaGen, rows: int, workspace: Workspace | None, spec: SamplingSpec = PLAIN
) -> Decoded:
    conditions = policy.encode([Condition(text="", class_index=row % 4) for row in range(rows)])
    generator = torch.Generator().manual_seed(rows)
    draws = torch.rand(rows, policy.num_tokens, dtype=torch.float64, generator=generator)
    return decode_tokens(policy, conditions, draws, spec, workspace)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, SamplingSpec]]:
    """(rows, spec) of every step that was set up: on a GPU, of every capture."""
    found: list[tuple[int, SamplingSpec]] = []

    class Recorded(StaticStep):
        def __init__(
            self, policy: Any, state: Any, spec: SamplingSpec, size: int, batch: int
        ) -> None:
            found.append((batch, spec))
            super().__init__(policy, state, spec, size, batch)

    monkeypatch.setattr(steps, "StaticStep", Recorded)
    return found


def check(policy: LlamaGen, rows: int, workspace: Workspace, spec: SamplingSpec = PLAIN) -> None:
    """As in a workspace of its own."""
    found, alone = decode(policy, rows, workspace, spec), decode(policy, rows, None, spec)
    assert torch.equal(found.tokens, alone.tokens)
    torch.testing.assert_close(found.logprobs, alone.logprobs, rtol=1e-5, atol=1e-5)


def test_sizes_take_turns_without_another_capture(made: list[Any]) -> None:
    """Training, evaluation, gallery."""
    policy = tiny_policy()
    workspace = Workspace(policy, static=True)
    turns = [(24, PLAIN), (12, PLAIN), (5, SPECS["guided"]), (24, PLAIN), (12, SPECS["guided"])]
    for rows, spec in turns * 2:
        check(policy, rows, workspace, spec)
    assert made == [turns[0], turns[1], turns[2], turns[4]]


def test_the_memory_is_that_of_the_largest_batch(made: list[Any]) -> None:
    policy = tiny_policy()
    workspace = Workspace(policy, static=True)
    allocated: list[int] = []
    allocate = policy.allocate

    def counting(rows: int, dtype: torch.dtype | None = None) -> Any:
        allocated.append(rows)
        return allocate(rows, dtype)

    policy.allocate = counting  # type: ignore[method-assign]
    for rows in (4, 12, 4, 6, 12):
        decode(policy, rows, workspace)
    assert allocated == [4, 12]
    assert made == [(4, PLAIN), (12, PLAIN), (4, PLAIN), (6, PLAIN)]


def test_the_least_recently_used_steps_are_dropped(
    made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "KEPT", 2)
    policy = tiny_policy()
    workspace = Workspace(policy, static=True)
    for rows in (6, 4, 6, 2, 6, 4):
        check(policy, rows, workspace)
    assert [rows for rows, _ in made] == [6, 4, 2, 4]


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is on a GPU, as its views do."""

    is_cuda = True


def test_a_capture_that_failed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step would else be run, uncaptured, without a word."""
    captures: list[int] = []

    def capture(*_: object) -> None:
        captures.append(1)
        if len(captures) < 3:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(StaticStep, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    policy = tiny_policy()
    allocate = policy.allocate

    def on_cuda(*inputs: Any) -> Any:
        state = allocate(*inputs)
        state.cache = state.cache.as_subclass(OnCuda)
        return state

    policy.allocate = on_cuda  # type: ignore[method-assign]
    workspace = Workspace(policy)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            decode(policy, 4, workspace)
    decode(policy, 4, workspace)
    decode(policy, 4, workspace)
    assert len(captures) == 3


def test_what_was_not_finite_does_not_stay_in_the_cache() -> None:
    policy = tiny_policy()
    workspace = Workspace(policy, static=True)
    check(policy, 4, workspace)
    weight = policy.get_parameter("layers.0.attention.wqkv.weight")
    kept = weight.clone()
    weight.fill_(torch.nan)
    with pytest.raises(NotFiniteError):
        decode(policy, 4, workspace)
    weight.copy_(kept)
    check(policy, 4, workspace)
