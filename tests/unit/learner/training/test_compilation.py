"""Compiled blocks: the same numbers, whole graphs, few compilations, and no silent failure."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from actors.checkpoints.loading import init_policy
from cluster.errors import ConfigError
from cluster.messages import SamplingSpec
from cluster.model_files.tensors import write_tensors
from learner.training import compilation
from learner.training.compilation import CompiledForward
from learner.training.data_parallel import blocks_of
from learner.training.lora import LoraConfig
from learner.training.policy import LearnerPolicy
from tests.unit.learner.training.test_policy import FAMILIES, gradients, inputs, trained

CASES: list = [
    ("classes", {"checkpointing": True}),
    pytest.param("classes", {"lora": LoraConfig(rank=2)}, marks=pytest.mark.slow),
    pytest.param("captions", {"precision": "bf16"}, marks=pytest.mark.slow),
    pytest.param("taming", {"checkpointing": True, "precision": "bf16"}, marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def policies(folder: Path, name: str, options: dict) -> tuple[LearnerPolicy, LearnerPolicy]:
    """The same policy as it is, and compiled."""
    torch.manual_seed(0)
    file = folder / "policy.safetensors"
    write_tensors(file, init_policy(FAMILIES[name]).state_dict(), FAMILIES[name].to_dict())
    return trained(str(file), **options), trained(str(file), compile="always", **options)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line.getMessage() for line in caplog.records if line.name == compilation.__name__]


def assert_equal(found: dict, expected: dict, share: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        gap = (found[name] - gradient).norm()
        assert gap <= share * gradient.norm() + 1e-5, name


@pytest.mark.parametrize(("name", "options"), CASES)
def test_whole_graphs_for_any_number_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict
) -> None:
    """Forward and backward graphs are traced without a break, once for all blocks; other numbers of
    rows need no other. Only code generation is left out here."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compilation, "BACKEND", counter)
    plain, compiled = policies(tmp_path, name, options)
    assert compiled.module.state_dict().keys() == plain.module.state_dict().keys()
    assert_equal(gradients(compiled), gradients(plain), 0.02 if "precision" in options else 1e-5)
    first = counter.frame_count
    assert first == (2 if "lora" in options else 1)  # frozen embeddings: the first block's differs
    tokens, conditions = inputs(compiled)
    for rows in (3, 2, 4, 3):
        compiled.logprobs(
            tokens[:rows], conditions[:rows], SamplingSpec()
        ).logprobs.sum().backward()
    # biases of captions have a number of rows of their own
    assert counter.frame_count <= first * (2 if name == "captions" else 1)


def test_a_failure_is_said_once_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*_: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(compilation, "BACKEND", no_compiler)
    plain, compiled = policies(tmp_path, "classes", {})
    with caplog.at_level(logging.WARNING):
        found = gradients(compiled)
    (message,) = warnings(caplog)
    assert "no C++ compiler" in message
    assert "--learner.compile never" in message
    for name, gradient in gradients(plain).items():
        assert torch.equal(found[name], gradient), name


def test_a_failure_stops_a_reproducible_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its samples would differ in rounding from those of a run that compiles."""

    def no_compiler(*_: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(compilation, "BACKEND", no_compiler)
    _, compiled = policies(tmp_path, "classes", {})
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ConfigError, match=r"no C\+\+ compiler.*: set --learner.compile never"):
            gradients(compiled)
    finally:
        torch.use_deterministic_algorithms(False)


def test_errors_of_the_computation_are_no_failures_of_compilation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> object:
        def run(*_: object) -> None:
            raise MemoryError("out of memory")

        return run

    monkeypatch.setattr(compilation, "BACKEND", broken)
    _, compiled = policies(tmp_path, "classes", {})
    with pytest.raises(MemoryError):
        gradients(compiled)
    assert not warnings(caplog)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"checkpointing": True, "precision": "bf16"}])
@pytest.mark.parametrize("name", FAMILIES)
def test_generated_code_computes_the_same(tmp_path: Path, name: str, options: dict) -> None:
    """With Inductor, which needs a C++ compiler here."""
    plain, compiled = policies(tmp_path, name, options)
    assert_equal(gradients(compiled), gradients(plain), 0.02 if options else 1e-4)
    for block in blocks_of(compiled.module):
        assert isinstance(block.forward, CompiledForward)
        assert not block.forward._fallback.failed
