"""What a step waits for: not for the device in each microbatch, and one copy for a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from actors.checkpoints.loading import count_parameters, init_policy
from actors.models.base import Policy
from cluster.messages import Condition, SamplingSpec
from cluster.model_files.tensors import write_tensors
from learner.grpo.loss import LossConfig
from learner.training.learner import Learner
from learner.training.optimizer import OptimizerConfig
from learner.training.preparation import StatsAccumulator
from learner.training.real_tokens import RealTokensConfig
from learner.training.transfers import StepConditions
from tests.unit.helpers import TINY
from tests.unit.learner.training.test_determinism import random_batch
from tests.unit.learner.training.test_policy import FAMILIES, family, trained  # noqa: F401
from tests.unit.learner.training.test_real_tokens import CLASSES, TOKENS
from tests.unit.learner_cases import batch_of, make, tiny_policy_file

WAITS = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "__float__",
    "__int__",
    "__bool__",
    "__index__",
    "nonzero",
}
"""Methods of tensors that wait for the device, or whose result's shape does."""


class Calls(TorchFunctionMode):
    """Counts calls by name."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self._names, self.count = names, 0

    def __torch_function__(
        self, function: Callable, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        self.count += getattr(function, "__name__", "") in self._names
        return function(*arguments, **(options or {}))


LOSSES = {
    "plain": LossConfig(),
    "everything": LossConfig(
        ratio_to="proximal", importance_cap=2.0, mask_low=0.2, mask_high=5.0, kl_coef=0.1
    ),
}


@pytest.mark.parametrize("spec", [SamplingSpec(), SamplingSpec(cfg_scale=1.5, guidance="guided")])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_microbatch_waits_for_nothing(tmp_path: Path, loss: str, spec: SamplingSpec) -> None:
    """A step of 2 microbatches has as many synchronisations as one of 8."""
    policy, counts = tiny_policy_file(tmp_path), []
    np.savez(tmp_path / "real.npz", tokens=TOKENS, classes=CLASSES)
    for microbatch in (4, 1):
        real = RealTokensConfig(weight=0.1, source=str(tmp_path / "real.npz"), batch=8)
        options = OptimizerConfig(microbatch=microbatch, checkpointing=True)
        learner = make(policy, loss=LOSSES[loss], spec=spec, optimizer=options, real=real)
        batch = batch_of(learner, spec=spec)
        with Calls(WAITS) as calls:
            learner.step(batch)
        counts.append(calls.count)
    assert counts[0] == counts[1] > 0


def encodings(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of conditions of each call of `encode`, as they come."""
    found: list[int] = []
    encode = policy.encode

    def counted(conditions: Any) -> Any:
        found.append(len(conditions))
        return encode(conditions)

    monkeypatch.setattr(policy, "encode", counted)
    return found


def test_conditions_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = OptimizerConfig(microbatch=2, updates_per_iteration=2, minibatches=2)
    learner = make(tiny_policy_file(tmp_path), loss=LOSSES["everything"], optimizer=options)
    batch = batch_of(learner)
    shared = tuple(batch.conditions[row // 4] for row in range(8))
    found = encodings(learner._policy.module, monkeypatch)
    learner.step(dataclasses.replace(batch, conditions=shared))
    assert found == [2]  # two distinct ones


def test_selected_conditions_are_encoded_ones(family: str) -> None:  # noqa: F811
    module = trained(family).module
    features = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32)
    asked = [Condition(text="", class_index=at, features=features[at, : at + 2]) for at in range(3)]
    conditions = [asked[at] for at in (0, 0, 1, 1, 2, 2)]
    given = StepConditions(module, conditions)
    tokens = torch.zeros(2, module.num_tokens, dtype=torch.long)
    for rows in (slice(1, 3), slice(4, 6), np.array([0, 5])):
        expected = module.encode([conditions[row] for row in np.arange(6)[rows]])
        with Calls(WAITS) as calls:
            found = given[rows].batch()
        assert calls.count == 0
        assert len(found.values) == len(expected.values)  # no caption that nobody asked for
        with torch.no_grad():
            assert torch.equal(module(tokens, found), module(tokens, expected))


class Bytes(TorchDispatchMode):
    """Sums the bytes of new storages."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self._alive = 0, []

    def __torch_dispatch__(
        self, function: Callable, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        known = {t.untyped_storage().data_ptr() for t in arguments if isinstance(t, torch.Tensor)}
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
            self.total += result.untyped_storage().nbytes()
            self._alive.append(result)
        return result


@pytest.mark.parametrize(("background", "copies"), [(True, 1), (False, 0)])
def test_a_checkpoint_is_copied_once(tmp_path: Path, background: bool, copies: int) -> None:
    """12 bytes a parameter in the background, and nothing without."""
    learner = make(tiny_policy_file(tmp_path))
    learner.step(batch_of(learner))
    with Bytes() as copied:
        learner.save(tmp_path, background=background)
    steps = 4 * len(learner._policy.module.state_dict())  # AdamW's counters
    assert copied.total == copies * (12 * count_parameters(TINY) + steps)
    assert learner.saved(30)
    assert learner._writing is None  # the copies are given back


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_a_microbatch_waits_for_nothing_on_a_gpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA itself refuses synchronisation between the first microbatch and the last."""
    learner = gpu_learner(name, tmp_path)
    # compilation and lazy initialisation may wait
    learner.step(random_batch(FAMILIES[name], 0, SamplingSpec()))

    @contextmanager
    def refused() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    accumulate = learner._accumulate

    def watched(*arguments: Any) -> StatsAccumulator:
        with refused():
            return accumulate(*arguments)

    monkeypatch.setattr(learner, "_accumulate", watched)
    assert learner.step(random_batch(FAMILIES[name], 1, SamplingSpec())).version == 2


def gpu_learner(name: str, folder: Path) -> Learner:
    torch.manual_seed(0)
    file = folder / "policy.safetensors"
    write_tensors(file, init_policy(FAMILIES[name]).state_dict(), FAMILIES[name].to_dict())
    options = OptimizerConfig(num_gpus=1, microbatch=2, precision="bf16")
    return make(str(file), optimizer=options)
