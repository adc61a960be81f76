"""Deterministic algorithms: set where every process that computes starts, and what they refuse."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.decoding.decode import token_logprobs
from actors.models.taming import TamingConfig, TamingGPT
from cluster.errors import ConfigError
from cluster.fleet import InlineFleet
from cluster.messages import Condition, SamplingSpec
from cluster.program.console import REFUSED as STATUS
from cluster.program.precision import (
    CUBLAS_WORKSPACE,
    FIXED_WORKSPACES,
    NCCL_ALGORITHM,
    deterministic_algorithms,
    refusals_explained,
    start_computing,
)
from learner.checkpoints.resume import check_resume
from learner.config import RunConfig, to_dict, validate
from learner.fleet_plan import fleet_plan
from learner.run import main
from learner.training.policy import LearnerPolicy, any_conditions
from rewards.config import BatchingConfig, RewardsConfig, RewardServerConfig
from rewards.servers.panel import Panel
from rewards.servers.reward_server import RewardServer
from tests.small_run import fingerprint, run_training, small_config
from tests.unit.helpers import TINY, random_policy, request
from tests.unit.learner_cases import make, tiny_policy_file

REFUSED = r"\(put_ does not have a deterministic implementation\): leave out --reproducible"


@pytest.fixture(autouse=True)
def put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (CUBLAS_WORKSPACE, NCCL_ALGORITHM):
        monkeypatch.setenv(name, "removed")  # so that it is restored
        monkeypatch.delenv(name)
    deterministic, fills = torch.backends.cudnn.deterministic, torch.utils.deterministic
    yield
    torch.use_deterministic_algorithms(False)
    fills.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = deterministic


def is_deterministic() -> bool:
    return (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
        and torch.backends.cudnn.deterministic
        and not torch.backends.cudnn.benchmark
        and os.environ.get(CUBLAS_WORKSPACE) in FIXED_WORKSPACES
    )


def refused() -> None:
    """An operation that has no deterministic algorithm on CPUs either."""
    torch.zeros(3).put_(torch.tensor([0, 1]), torch.ones(2))


@pytest.mark.parametrize("role", ["reward_server", "sampler", "learner"])
def test_every_role_starts_so_if_asked(role: str) -> None:
    assert not is_deterministic()
    made = getattr(fleet_plan(RunConfig(reproducible=True)), role)
    made.factory(made.config, name="it")
    assert is_deterministic()


def test_workers_on_ray_keep_what_the_environment_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":16:8")
    monkeypatch.setenv(NCCL_ALGORITHM, "Tree")
    found = fleet_plan(RunConfig(reproducible=True)).sampler.environment
    assert found == {CUBLAS_WORKSPACE: ":16:8", NCCL_ALGORITHM: "Tree"}


def test_what_the_environment_asks_for_is_kept_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":16:8")
    monkeypatch.setenv(NCCL_ALGORITHM, "Tree")
    deterministic_algorithms()
    assert os.environ[CUBLAS_WORKSPACE] == ":16:8"
    assert os.environ[NCCL_ALGORITHM] == "Tree"
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":4096:2")
    with pytest.raises(ConfigError, match=r"to be :4096:8 or :16:8, found ':4096:2'"):
        deterministic_algorithms()


def test_cuda_must_not_have_started_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match="before CUDA starts, and this process has started it"):
        start_computing(reproducible=True)
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":4096:8")
    start_computing(reproducible=True)
    assert is_deterministic()


def test_the_command_sets_its_environment_before_it_looks_at_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which starts CUDA in the process that `--inline` computes in."""
    seen = []

    def looked() -> tuple[str, float]:
        seen.append(os.environ.get(CUBLAS_WORKSPACE))
        return "", 0.0

    monkeypatch.setattr("learner.preflight.this_gpu", looked)
    assert main(["--dry-run", "--inline", "--reproducible"]) == 0
    assert seen == [":4096:8"]
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":0:0")
    assert main(["--dry-run", "--inline", "--reproducible"]) == STATUS
    assert "found ':0:0' in the environment: remove the variable" in capsys.readouterr().err


def test_a_refused_operation_is_explained_and_other_errors_pass() -> None:
    deterministic_algorithms()
    with (
        pytest.raises(ConfigError, match=f"reproducible: a part cannot be computed.*{REFUSED}"),
        refusals_explained("a part"),
    ):
        refused()
    with pytest.raises(RuntimeError, match="another"), refusals_explained("a part"):
        raise RuntimeError("another")


class Refuses:
    """A user's reward."""

    def __init__(self, device: str) -> None:
        pass

    def __call__(self, images: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
        refused()
        return images.mean((1, 2, 3))


def test_a_scorer_that_is_refused_stops_the_run_and_no_image_is_blamed() -> None:
    rewards = RewardsConfig(extra=("tests.unit.cluster.program.test_reproducible:Refuses",))
    images = np.zeros((2, 8, 8, 3), np.uint8)
    asked = request(rollouts=2, condition=Condition(text="a three", class_index=3))
    server = RewardServer(RewardServerConfig(judge=None, rewards=rewards))
    assert server.score(asked, images).errors == (None, None)
    server = RewardServer(RewardServerConfig(judge=None, rewards=rewards, reproducible=True))
    with pytest.raises(ConfigError, match=f"refuses cannot be computed reproducibly.*{REFUSED}"):
        server.score(asked, images)


def test_a_network_that_is_refused_is_found_when_the_server_starts() -> None:
    class Network:
        def warm(self) -> None:
            refused()

        def __call__(self, images: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
            return images.mean((1, 2, 3))

    deterministic_algorithms()
    with pytest.raises(ConfigError, match=f"clip cannot be computed reproducibly.*{REFUSED}"):
        Panel({"clip": Network()}, {}).warm()


def test_a_backward_pass_that_is_refused_is_found_when_the_learner_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tiny_policy_file(tmp_path)
    make(file, reproducible=True)
    plain = LearnerPolicy.logprobs

    def logprobs(*args: object) -> object:
        found = plain(*args)  # type: ignore[arg-type]
        found.logprobs.register_hook(lambda gradient: refused())
        return found

    monkeypatch.setattr(LearnerPolicy, "logprobs", logprobs)
    with pytest.raises(ConfigError, match=f"the policy's backward pass cannot be.*{REFUSED}"):
        make(file, reproducible=True)


@pytest.mark.parametrize("kind", ["captions", "classes", "coordinates"])
def test_every_policy_takes_the_conditions_of_that_pass(kind: str) -> None:
    if kind == "captions":
        policy = random_policy(replace(TINY, caption_dim=6, caption_tokens=5))
    elif kind == "classes":
        policy = random_policy(TINY)
    else:
        sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 64, "grid": 2}
        grid = {"image_size": 32, "coordinate_levels": 16, "coordinate_stride": 16}
        policy = TamingGPT(TamingConfig(**sizes, **grid, block_size=8, condition="coordinates"))  # type: ignore[arg-type]
    tokens = torch.zeros(2, policy.num_tokens, dtype=torch.int64)
    logprobs, _ = token_logprobs(policy, tokens, any_conditions(policy), SamplingSpec())
    assert logprobs.isfinite().all()


def test_requests_at_once_are_scored_alone() -> None:
    options = {"judge": None, "batching": BatchingConfig(max_batch=32, max_wait_ms=100.0)}
    server = RewardServer(RewardServerConfig(**options, reproducible=True))  # type: ignore[arg-type]
    generator = np.random.default_rng(0)
    condition = Condition(text="a three", class_index=3)
    images = generator.integers(0, 256, (6, 4, 8, 8, 3), np.uint8)
    with ThreadPoolExecutor(6) as pool:
        asked = [request(group, 4, condition=condition) for group in range(6)]
        together = list(pool.map(server.score, asked, images))
    assert server.stats().batches == 6
    for number, found in enumerate(together):
        alone = server.score(asked[number], images[number])
        for name, values in alone.scores.items():
            np.testing.assert_array_equal(found.scores[name], values)


def test_groups_that_are_decoded_together_are_refused() -> None:
    config = RunConfig()
    with pytest.raises(
        ValueError, match=r"needs sampler.max_groups 1.*found 4: add --sampler.max-groups 1"
    ):
        replace(config, sampler=replace(config.sampler, max_groups=4), reproducible=True)


def test_it_belongs_to_the_run() -> None:
    """A resumed run cannot change it; a configuration of before it reads as without."""
    run = RunConfig()
    with pytest.raises(ConfigError, match=r"cannot change reproducible \(False in the run, True"):
        check_resume(run, replace(run, reproducible=True))
    older = to_dict(run)
    del older["reproducible"]
    check_resume(validate(older, "config.yaml"), run)


def test_a_resumed_run_keeps_what_changes_rounding() -> None:
    run = replace(RunConfig(), reproducible=True)
    check_resume(run, replace(run, num_samplers=5))
    for name, change in {
        "num_learners": {"num_learners": 2},
        "learner.microbatch": {"learner": replace(run.learner, microbatch=3)},
        "learner.compile": {"learner": replace(run.learner, compile="never")},
        "sampler.kernels": {"sampler": replace(run.sampler, kernels="torch")},
    }.items():
        check_resume(RunConfig(), replace(RunConfig(), **change))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=rf"cannot change {name} "):
            check_resume(run, replace(run, **change))  # type: ignore[arg-type]


def test_on_a_cpu_it_changes_no_number() -> None:
    """Nor do NaN in memory that was not written: none is read, so that it need not be filled."""

    def found(**changes: object) -> list[tuple]:
        config = small_config(iterations=1, real={"weight": 0.1}, **changes)
        with InlineFleet(fleet_plan(config)) as fleet:
            torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
            return fingerprint(run_training(config, fleet))

    plain = found()
    assert not torch.are_deterministic_algorithms_enabled()
    assert found(reproducible=True) == plain
    assert is_deterministic()
    assert torch.empty(3).isnan().all()
