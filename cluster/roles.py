"""The roles of a fleet: their workers, resources and methods.

Roles are plain classes built as `factory(config, name=...)`. The same classes run in this process
(`InlineFleet`) or as Ray actors (`RayFleet`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cluster.errors import FleetError
from cluster.messages import (
    MAIN_SPACE,
    GroupScores,
    RolloutGroup,
    SampleRequest,
    ServerStats,
    WeightSnapshot,
)
from cluster.placement.config import PlacementConfig
from cluster.placement.labels import LabelSelector, check_selector
from cluster.spans import Span

FEATURE_BATCH = 256
"""Real images in one call of `RewardServerRole.features`."""
ACCELERATOR = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
Pictures = np.ndarray | Sequence[np.ndarray]
"""(N, H, W, 3) uint8, or N arrays (H, W, 3) uint8 of any sizes."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one worker of a role takes of its machine."""

    num_cpus: float = 0.0
    """CPUs that Ray reserves for each worker; 0 is an equal share of what the machine has."""
    num_gpus: float = 0.0
    """GPUs of each worker; above 0 it computes on `cuda`. A fraction shares a GPU, and is the
    worker's part of its memory, too."""
    num_threads: int = 1
    """Threads of a worker's numerical libraries."""
    labels: LabelSelector = field(default_factory=dict)
    """Labels that the node of a worker must have, each VALUE, in(A,B), !VALUE or !in(A,B), as in
    tessera-role=sampler. `ray start --labels` gives a node its labels."""
    accelerator_type: str = ""
    """Kind of GPU that the node of a worker must have, as Ray names it: H100, A100, L4, ..."""

    def __post_init__(self) -> None:
        if self.num_cpus < 0 or self.num_gpus < 0:
            raise ValueError(
                f"num_cpus and num_gpus must be >= 0, found {self.num_cpus} and {self.num_gpus}"
            )
        if self.num_gpus > 1 and self.num_gpus % 1:
            raise ValueError(
                f"num_gpus above 1 must be whole (Ray shares one GPU at most), found "
                f"{self.num_gpus:g}"
            )
        if self.num_threads < 1:
            raise ValueError(f"num_threads must be >= 1, found {self.num_threads}")
        check_selector(self.labels)
        if self.accelerator_type and not ACCELERATOR.fullmatch(self.accelerator_type):
            raise ValueError(
                "accelerator_type is a name as Ray has it (H100, A100, L4, ...), found "
                f"{self.accelerator_type!r}"
            )

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus > 0 else "cpu"


@dataclass(frozen=True, kw_only=True)
class QuotaConfig:
    """Most that all workers of the run reserve together, also after scaling."""

    cpus: float = 0.0
    """CPUs; 0: no bound but the cluster's."""
    gpus: float = 0.0
    """GPUs; 0: no bound but the cluster's."""

    def __post_init__(self) -> None:
        for name, bound in (("cpus", self.cpus), ("gpus", self.gpus)):
            if not 0 <= bound < math.inf:
                raise ValueError(f"{name} must be >= 0, found {bound:g}")

    @property
    def on(self) -> bool:
        return self.cpus > 0 or self.gpus > 0

    def of_cpus(self, there: float) -> float:
        """The CPUs, of those that are there, that the run may reserve."""
        return min(there, self.cpus) if self.cpus else there

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPUs"] * (self.cpus > 0) + [f"{self.gpus:g} GPUs"] * (
            self.gpus > 0
        )
        return " and ".join(parts)


@dataclass(frozen=True, kw_only=True)
class AutoscaleConfig:
    """Scaling by queue wait."""

    min: int = 0
    """Fewest workers; 0 is one."""
    max: int = 0
    """Most workers; 0 turns scaling off."""
    target_wait_s: float = 1.0
    """Mean queue wait, seconds, above which more workers are started."""
    every_s: float = 15.0
    """Seconds of observation behind each decision."""

    def __post_init__(self) -> None:
        if self.min < 0 or self.max < 0:
            raise ValueError(f"min and max must be >= 0, found {self.min} and {self.max}")
        if self.max and self.min > self.max:
            raise ValueError(f"min must be at most max, found {self.min} and {self.max}")
        if self.min and not self.max:
            raise ValueError("min bounds scaling, which max turns on: set max, too")
        if not (self.target_wait_s > 0 and self.every_s > 0):
            raise ValueError("target_wait_s and every_s must be > 0 seconds")

    @property
    def on(self) -> bool:
        return self.max > 0

    def bounded(self, count: int) -> int:
        """The nearest allowed number of workers."""
        return min(max(count, self.min, 1), self.max) if self.on else max(count, 1)


@dataclass(frozen=True, kw_only=True)
class Role:
    """How to build the workers of a role, and how many."""

    name: str
    factory: Callable[..., Any]
    config: Any
    resources: Resources
    count: int = 1
    """Workers at the start; 0: the fleet has none."""
    depth: int = 2
    """Requests that one worker has at a time: with 2, the next is there when one ends; more let it
    work on several together."""
    max_groups: int = 1
    """Groups that one call may hold, ..."""
    max_rows: int = 0
    """... and rows (`SampleRequest.rows`), for which memory was planned; 0: any number. A call of
    one group may hold more."""
    concurrency: int = 1
    """Threads of one worker; with 1, it answers in order."""
    autoscale: AutoscaleConfig = field(default_factory=AutoscaleConfig)
    panels: tuple[str, ...] = ()
    """Of a further pool of reward servers: the panels that it scores for."""
    feature_panels: tuple[str, ...] = ()
    """Of a further pool of reward servers: the panels whose feature network it runs."""
    scorers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of reward servers: panel -> names of the scores in an answer; unchecked for other panels."""
    spaces: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of reward servers: panel -> names of the features in an answer; unchecked for other
    panels."""
    runtime_env: Mapping[str, Any] | None = None
    """Ray runtime environment of its workers, if not the driver's."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that its workers set before anything else."""

    @property
    def max_count(self) -> int:
        """The largest number of workers that autoscaling reaches."""
        return max(self.count, self.autoscale.max)

    def groups_in_call(self, rows: int) -> int:
        """The most groups of `rows` rows each that one call may hold."""
        fitting = self.max_rows // rows if self.max_rows else self.max_groups
        return max(min(self.max_groups, fitting), 1)

    def worker_name(self, index: int) -> str:
        return self.name if self.max_count == 1 and index == 0 else f"{self.name}-{index}"


@dataclass(frozen=True, kw_only=True)
class FleetPlan:
    """All roles of a run; of an evaluation, too, where those that learn have no workers."""

    sampler: Role
    """No workers: images are given (`Fleet.score_images`)."""
    reward_server: Role
    """The main pool, which scores for every panel."""
    moments_server: Role
    learner: Role
    """No workers: samplers load the policy by themselves, as version 0."""
    reward_pools: tuple[Role, ...] = ()
    """Further reward servers, with other scorers."""
    slots: int = 64
    """Groups in flight at a time, for training or not: (S + 1) P."""
    timeout_s: float = 600.0
    """Longest wait for any one answer, seconds."""
    heartbeat_s: float = 60.0
    """Longest silence of a worker before it is replaced, seconds; 0 turns heartbeats off."""
    max_restarts: int = 3
    """How often any one worker is replaced within an hour before the run stops."""
    max_staleness: int = 0
    """S: how many updates older than the learner's the weights of rollouts may be."""
    transport: str = "object-store"
    """How weights reach the samplers: see `cluster.ray_backend.transports`."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    adapters_alone: bool = False
    """The learner trains adapters: after the frozen weights, only these travel."""
    quota: QuotaConfig = field(default_factory=QuotaConfig)
    """Most that all workers reserve together."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """Those with workers, in the order in which they start."""
        every = (self.learner, self.moments_server, self.sampler, *self.servers)
        return tuple(role for role in every if role.count)

    @property
    def own_weights(self) -> bool:
        """Whether samplers load the policy by themselves, since no learner publishes it."""
        return not self.learner.count

    def need(self, role: Role) -> None:
        """
        Raises:
            FleetError: the fleet has no such workers.
        """
        if not role.count:
            there = ", ".join(role.name for role in self.roles)
            raise FleetError(f"this fleet has no {role.name}: it was started to evaluate ({there})")

    @property
    def servers(self) -> tuple[Role, ...]:
        """All pools of reward servers, in the order in which their scores are merged."""
        return (self.reward_server, *self.reward_pools)

    def scoring_pools(self, panel: str) -> tuple[Role, ...]:
        """The pools that score for a panel, in the order of the merge."""
        return (self.reward_server, *(role for role in self.reward_pools if panel in role.panels))

    def feature_server(self, panel: str) -> Role:
        """The pool that runs a panel's feature network."""
        claims = (role for role in self.reward_pools if panel in role.feature_panels)
        return next(claims, self.reward_server)


class SamplerRole(Protocol):
    def load_weights(self, snapshot: WeightSnapshot, base: WeightSnapshot | None = None) -> int: ...

    def forget_weights(self) -> None: ...

    def sample(self, requests: Sequence[SampleRequest]) -> list[RolloutGroup]: ...

    def images(self, group: RolloutGroup) -> tuple[np.ndarray, Span]: ...


class RewardServerRole(Protocol):
    def fingerprint(self, panel: str, space: str = MAIN_SPACE) -> str: ...

    def feature_dim(self, panel: str, space: str = MAIN_SPACE) -> int: ...

    def score(self, request: SampleRequest, images: Pictures) -> GroupScores: ...

    def features(self, images: Pictures, panel: str) -> dict[str, np.ndarray]: ...

    def stats(self) -> ServerStats: ...


class MomentsRole(Protocol):
    """Of every feature space of the rewards. Answers are of `rewards.servers.moments_server`; this
    package does not import them."""

    def set_references(
        self, references: Mapping[str, Any], fingerprints: Mapping[str, str]
    ) -> None: ...

    def seed(self, starts: Mapping[str, Any]) -> dict[str, float]: ...

    def commit(
        self,
        iteration: int,
        features: Mapping[str, np.ndarray],
        valid: np.ndarray,
        *,
        run: str = "",
        classes: np.ndarray | None = None,
    ) -> dict[str, Any]: ...

    def refresh(self) -> None: ...

    def state(self) -> bytes: ...

    def restore(self, state: bytes) -> None: ...


class LearnerRole(Protocol):
    """Answers are of `learner.training.learner`; this package does not import them."""

    def snapshot(self) -> WeightSnapshot: ...

    def base_snapshot(self) -> WeightSnapshot: ...

    def adapter_snapshot(self) -> WeightSnapshot: ...

    def start(self, base_entropy: float) -> None: ...

    def step(self, batch: Any) -> Any: ...

    def save(self, directory: Path | None, background: bool = False) -> None: ...

    def saved(self, wait_s: float = 0.0) -> bool: ...

    def restore(self, directory: Path | None) -> int: ...

    def sees(self, file: Path, content: bytes) -> bool: ...

    def sizes(self) -> dict[str, int]: ...

    def send_part(self, name: str, start: int, size: int) -> bytes: ...

    def receive_part(self, name: str, data: bytes) -> None: ...

    def drop_files(self) -> None: ...
