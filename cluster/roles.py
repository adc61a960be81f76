"""What a fleet is made of: roles, the resources they ask for, and what each can be asked.

Roles are plain classes built as `factory(config, name=...)`. The same classes run in this process
(`InlineFleet`) or as Ray actors (`RayFleet`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cluster.messages import GroupScores, RolloutGroup, SampleRequest, WeightSnapshot


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one worker of a role takes of its machine."""

    num_cpus: float = 0.0
    """CPUs that Ray reserves for it; 0 is an equal share of what the machine has."""
    num_gpus: float = 0.0
    """GPUs that Ray reserves for it, fractions allowed; above 0 it computes on `cuda`."""
    num_threads: int = 1
    """Threads of its numerical libraries."""

    def __post_init__(self) -> None:
        if self.num_cpus < 0 or self.num_gpus < 0:
            raise ValueError(
                f"num_cpus and num_gpus must be >= 0, found {self.num_cpus} and {self.num_gpus}"
            )
        if self.num_threads < 1:
            raise ValueError(f"num_threads must be >= 1, found {self.num_threads}")

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus > 0 else "cpu"


@dataclass(frozen=True, kw_only=True)
class Role:
    """How to build one worker of a role, and how many there are."""

    name: str
    factory: Callable[..., Any]
    config: Any
    resources: Resources
    count: int = 1

    def worker_name(self, index: int) -> str:
        return self.name if self.count == 1 else f"{self.name}-{index}"


@dataclass(frozen=True, kw_only=True)
class FleetPlan:
    """All roles of a run."""

    sampler: Role
    reward_server: Role
    moments_server: Role
    learner: Role
    timeout_s: float = 600.0
    """Longest wait for any one answer; past it the run stops and says who did not answer."""
    max_restarts: int = 3
    """How many lost workers are replaced before the run stops."""

    @property
    def roles(self) -> tuple[Role, ...]:
        return (self.learner, self.moments_server, self.sampler, self.reward_server)


class SamplerRole(Protocol):
    def load_weights(self, snapshot: WeightSnapshot) -> int: ...

    def sample(self, request: SampleRequest) -> tuple[RolloutGroup, np.ndarray]: ...


class RewardServerRole(Protocol):
    def fingerprint(self, panel: str) -> str: ...

    def score(self, request: SampleRequest, images: np.ndarray) -> GroupScores: ...

    def features(self, images: np.ndarray, panel: str) -> dict[str, np.ndarray]: ...


class MomentsRole(Protocol):
    """Answers are of `rewards.moments_server`; this package does not import them."""

    def set_reference(self, reference: Any, fingerprint: str) -> None: ...

    def seed(self, features: np.ndarray) -> float: ...

    def commit(
        self,
        iteration: int,
        features: np.ndarray,
        valid: np.ndarray,
        *,
        run: str = "",
        classes: np.ndarray | None = None,
    ) -> Any: ...

    def refresh(self) -> None: ...

    def state(self) -> bytes: ...

    def restore(self, state: bytes) -> None: ...


class LearnerRole(Protocol):
    """Answers are of `learner.learner`; this package does not import them."""

    def snapshot(self) -> WeightSnapshot: ...

    def start(self, base_entropy: float) -> None: ...

    def step(self, batch: Any) -> Any: ...

    def save(self, directory: Path) -> None: ...

    def restore(self, directory: Path) -> int: ...
