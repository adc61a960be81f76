"""Which kernels are chosen, and what is said where Triton's cannot be."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import actors.kernels
from actors.kernels import choice, plain
from actors.kernels.interface import Window
from actors.sampler import SamplerResources
from cluster.errors import ConfigError

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_tried() -> Iterator[None]:
    choice._tried.cache_clear()
    yield
    choice._tried.cache_clear()


def test_a_cpu_computes_in_plain_pytorch_and_says_nothing(logged: list[str]) -> None:
    assert choice.best_kernels(torch.zeros(2, 64)) is plain
    assert logged == []


def test_the_trial_passes_and_finds_kernels_that_deviate() -> None:
    """On a CPU through the interpreter, as the tests of the kernels."""
    pytest.importorskip("triton", reason="Triton exists on Linux only")
    from actors.kernels import fused

    with torch.inference_mode():  # as decoding is
        assert choice._tried(DEVICE, torch.float32, 8) is fused

    def doubled(*inputs: object) -> torch.Tensor:
        return 2 * plain.attention(*inputs)  # type: ignore[arg-type]

    def without_bias(qkv: object, cache: object, window: Window, *rope: object) -> torch.Tensor:
        return plain.attention(qkv, cache, replace(window, bias=None), *rope)  # type: ignore[arg-type]

    for attention, name in ((doubled, "attention"), (without_bias, "attention with a bias")):
        broken = SimpleNamespace(**vars(plain) | {"attention": attention})
        found = choice.trial(broken, DEVICE, torch.float32, 8)  # type: ignore[arg-type]
        assert found.startswith(f"{name} deviates by ")


@pytest.mark.parametrize(
    ("dtype", "head_dim", "failure", "reason"),
    [
        (torch.float64, 64, None, "in float64, expected one of float32, bfloat16, float16"),
        (torch.float32, 300, None, "head dimension is 300, expected at most 256"),
        (torch.float32, 8, None, "Triton cannot be imported"),
        (torch.float32, 8, RuntimeError("no such arch"), "RuntimeError: no such arch"),
    ],
)
def test_one_message_says_why_triton_is_not_used(
    dtype: torch.dtype,
    head_dim: int,
    failure: Exception | None,
    reason: str,
    logged: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> str:
        raise failure or ImportError

    module = SimpleNamespace() if failure else None  # None: importing it raises
    monkeypatch.setitem(sys.modules, "actors.kernels.fused", module)  # type: ignore[arg-type]
    monkeypatch.delattr(actors.kernels, "fused", raising=False)
    if failure:
        monkeypatch.setattr(actors.kernels, "fused", module, raising=False)
    monkeypatch.setattr(choice, "trial", fails)
    for _ in range(2):
        assert choice._tried(DEVICE, dtype, head_dim) is plain
    assert len(logged) == 1
    assert logged[0].startswith("note: decoding without Triton's kernels, which is slower: ")
    assert reason in logged[0]


def test_a_cache_that_others_hold_is_of_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name, reason in (("cuda", ""), ("cuda:0", ""), ("cuda:1", "the cache is on cuda:1, ")):
        found = choice.unsupported(torch.device(name), torch.bfloat16, 64)
        assert found.startswith(reason)
        assert bool(found) == bool(reason)


def test_a_lost_context_is_no_reason_to_go_on(
    logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an illegal access every launch fails, the plain ones too."""

    def lost(*_: object) -> str:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(sys.modules, "actors.kernels.fused", SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setattr(actors.kernels, "fused", SimpleNamespace(), raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(choice, "trial", lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        choice._tried(torch.device("cuda", 0), torch.float32, 64)
    assert logged == []


def test_the_option_is_one_of_two() -> None:
    assert SamplerResources().kernels == "auto"


def test_a_reproducible_run_stops_instead() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"is 300, .*: set --sampler.kernels torch"):
                choice._tried(DEVICE, torch.float32, 300)
    finally:
        torch.use_deterministic_algorithms(False)
