"""Roles that compute nothing, for fleets that are about calls and failures.

Imports no torch: each worker process imports this module, and torch takes it seconds.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path

import numpy as np

from cluster.errors import TesseraError
from cluster.messages import Condition, GroupScores, RolloutGroup, SampleRequest, SamplingSpec
from cluster.roles import FleetPlan, Resources, Role
from cluster.spans import Span
from tests.stand_ins import Idle, InstantSampler, drawn

START_S = 120.0
SAMPLE_S, DECODE_S = 0.2, 0.15  # of `TwoHanded`


def requests(count: int) -> list[SampleRequest]:
    return [
        SampleRequest(
            stream="gallery",
            iteration=0,
            group=group,
            condition=Condition(text=""),
            num_rollouts=1,
            seed=0,
            spec=SamplingSpec(),
        )
        for group in range(count)
    ]


class Echo:
    """Stands in for every role; what it does is in its config."""

    def __init__(self, config: str, name: str) -> None:
        self.config, self.name = config, name
        if config == "cannot start":
            raise TesseraError("no such weights")

    def load_weights(self, snapshot: object) -> int:
        return 0

    def snapshot(self) -> str:
        return "weights"

    def sample(self, requests: list[SampleRequest]) -> list[RolloutGroup]:
        (request,) = requests
        match self.config:
            case "raises":
                raise TesseraError("the policy has no class 7")
            case "crashes":
                raise ZeroDivisionError("a bug")
            case "dies":
                os._exit(1)
            case "hangs":
                time.sleep(60)
        return [drawn(request)]

    def images(self, group: RolloutGroup) -> tuple[np.ndarray, Span]:
        return np.full((2, 2), group.tokens[0, 0]), Span(self.name, "decode", 0.0, 0.0)


def echo_plan(sampler: str = "", *, timeout_s: float = START_S, restarts: int = 1) -> FleetPlan:
    def role(name: str, config: str = "") -> Role:
        return Role(name=name, factory=Echo, config=config, resources=Resources(num_cpus=0.1))

    return FleetPlan(
        sampler=role("sampler", sampler),
        reward_server=role("reward-server"),
        moments_server=role("moments-server"),
        learner=role("learner"),
        timeout_s=timeout_s,
        max_restarts=restarts,
    )


def without(plan: FleetPlan, *fields: str) -> FleetPlan:
    """A plan in which some roles, by their fields, compute nothing."""
    idle = {
        field: dataclasses.replace(getattr(plan, field), factory=Idle, config=None, count=1)
        for field in fields
    }
    return dataclasses.replace(plan, **idle)


def learners_alone(plan: FleetPlan) -> FleetPlan:
    return without(plan, "sampler", "reward_server", "moments_server")


def servers_alone(plan: FleetPlan) -> FleetPlan:
    """Reward servers as they were, and one sampler that answers at once."""
    plan = without(plan, "sampler", "moments_server", "learner")
    sampler = dataclasses.replace(plan.sampler, factory=InstantSampler)
    return dataclasses.replace(plan, sampler=sampler)


def distinct_images(request: SampleRequest) -> np.ndarray:
    """(K, 32, 32, 3) uint8: what `DistinctSampler` answers with."""
    shape = (request.num_rollouts, 32, 32, 3)
    return np.random.default_rng(request.group).integers(0, 256, shape, np.uint8)


class DistinctSampler(InstantSampler):
    """Answers each request at once, with images of its own."""

    def images(self, group: RolloutGroup) -> tuple[np.ndarray, Span]:
        return distinct_images(group.request), Span("sampler", "decode", 0.0, 0.0)


class Slow:
    """Every role; `config` is the seconds that a group takes on the worker of each index."""

    def __init__(self, config: tuple[float, ...], name: str) -> None:
        index = name.rpartition("-")[2]
        self._seconds, self._version = config[int(index) if index.isdigit() else 0], 0

    def load_weights(self, snapshot: int) -> int:
        self._version = snapshot
        return snapshot

    def snapshot(self) -> int:
        self._version += 1
        return self._version

    def step(self, seconds: float) -> float:
        time.sleep(seconds)
        return time.time()

    def step_until(self, path: str) -> bool:
        """A step that ends once a file is there; False if it does not come."""
        deadline = time.monotonic() + START_S / 2
        while not Path(path).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        return Path(path).exists()

    def sample(self, requests: list[SampleRequest]) -> list[RolloutGroup]:
        time.sleep(self._seconds * len(requests))
        return [drawn(request, self._version) for request in requests]

    def images(self, group: RolloutGroup) -> tuple[np.ndarray, Span]:
        return np.full((1, 1), group.version), Span("sampler", "decode", 0.0, 0.0)

    def score(self, request: SampleRequest, images: np.ndarray) -> GroupScores:
        """A number of the group and of the version that drew it."""
        score = np.array([1000 * images[0, 0] + request.group], np.float32)
        return GroupScores(key=request.key, scores={"score": score}, features={}, errors=(None,))


class SlowScorer(Slow):
    """A reward server that takes `config` seconds for a group."""

    def score(self, request: SampleRequest, images: np.ndarray) -> GroupScores:
        time.sleep(self._seconds)
        return super().score(request, images)


class Held(Slow):
    """The second of these draws nothing while the file that `config` names is there."""

    def __init__(self, config: str, name: str) -> None:
        super().__init__((0.0,) * 2, name)
        self._hold = Path(config) if name.endswith("-1") else None

    def sample(self, requests: list[SampleRequest]) -> list[RolloutGroup]:
        while self._hold and self._hold.exists():
            time.sleep(0.02)
        return super().sample(requests)


class Once(Slow):
    """Starts once. `config` names the file that the first one leaves."""

    def __init__(self, config: str, name: str) -> None:
        if Path(config).exists():
            raise RuntimeError("no second one")
        super().__init__((0.0,), name)
        Path(config).touch()


def slow_plan(*seconds: float) -> FleetPlan:
    def role(name: str, config: tuple[float, ...] = (0.0,), count: int = 1) -> Role:
        resources = Resources(num_cpus=0.1)
        return Role(name=name, factory=Slow, config=config, resources=resources, count=count)

    return FleetPlan(
        sampler=role("sampler", seconds, len(seconds)),
        reward_server=role("server"),
        moments_server=role("moments"),
        learner=role("learner"),
        timeout_s=60,
    )


class TwoHanded:
    """A sampler of fixed costs that keeps a diary. `config` names a file: the first that decodes
    the images of group 2 dies in the middle, and leaves the file."""

    def __init__(self, config: str, name: str) -> None:
        self._died, self.name, self._version = config, name, 0
        self._diary: list[str] = []

    def load_weights(self, snapshot: int) -> int:
        self._diary.append(f"load {snapshot}")
        self._version = snapshot
        return snapshot

    def sample(self, requests: list[SampleRequest]) -> list[RolloutGroup]:
        (request,) = requests
        start = time.time()
        time.sleep(SAMPLE_S)
        self._diary.append(f"sample {request.group} with {self._version}")
        group = drawn(request, self._version)
        return [group.with_span(Span(self.name, "sample", start, time.time()))]

    def images(self, group: RolloutGroup) -> tuple[np.ndarray, Span]:
        start = time.time()
        number = int(group.tokens[0, 0])
        if self._died and number == 2 and not Path(self._died).exists():
            Path(self._died).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(DECODE_S)
        return np.full((1, 1), number), Span(self.name, "decode", start, time.time())

    def diary(self) -> list[str]:
        return self._diary


class Batches(TwoHanded):
    """Draws several groups in one call. `config` names a folder: a file there for each call, and
    the first call of two or more dies in the middle."""

    def sample(self, requests: list[SampleRequest]) -> list[RolloutGroup]:
        calls = Path(self._died)
        numbers = "-".join(str(request.group) for request in requests)
        first = not any("-" in path.name for path in calls.iterdir())
        (calls / f"{time.time()}_{numbers}").touch()
        if first and len(requests) > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(SAMPLE_S)
        return [drawn(request, self._version) for request in requests]

    def images(self, group: RolloutGroup) -> tuple[np.ndarray, Span]:
        return np.full((1, 1), group.tokens[0, 0]), Span(self.name, "decode", 0.0, 0.0)


class Counter:
    """A learner whose snapshots are numbers."""

    def __init__(self, config: str, name: str) -> None:
        self._version = 0

    def snapshot(self) -> int:
        self._version += 1
        return self._version


def two_handed_plan(died: str = "", restarts: int = 0) -> FleetPlan:
    def role(name: str, factory: type, config: str = "") -> Role:
        return Role(name=name, factory=factory, config=config, resources=Resources(num_cpus=0.1))

    return FleetPlan(
        sampler=role("sampler", TwoHanded, died),
        reward_server=role("reward-server", Echo),
        moments_server=role("moments-server", Echo),
        learner=role("learner", Counter),
        timeout_s=START_S,
        max_restarts=restarts,
    )


IMAGES = 120_000_000  # bytes


class Large:
    """Every role; its images are `IMAGES` large."""

    def __init__(self, config: str, name: str) -> None:
        self.name = name

    def sample(self, requests: list[SampleRequest]) -> list[RolloutGroup]:
        return [drawn(request) for request in requests]

    def images(self, group: RolloutGroup) -> tuple[np.ndarray, Span]:
        return np.zeros(IMAGES, np.uint8), Span(self.name, "decode", 0.0, 0.0)
