"""A fleet whose roles compute nothing, but send weights and images of known size: three samplers on
one host; the learner, and two pools of reward servers that score the same images, on another.

`python -m tests.distributed.hosts.counted ADDRESS` does what its lines of input say, `weights` or
`images`, and prints `done` after each.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from cluster.messages import GroupScores, RolloutGroup, SampleRequest, WeightSnapshot
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.session import RayConfig, RaySession
from cluster.roles import FleetPlan, Resources, Role
from cluster.scheduling.pool import State
from cluster.spans import Span
from tests.distributed.stubs import START_S, requests
from tests.stand_ins import Idle, drawn

WEIGHTS, IMAGES, GROUPS = 32 << 20, 4 << 20, 8  # bytes of a snapshot, of a group; groups
SAMPLERS, SERVERS = 3, 2  # of each pool


class Sender:
    """A learner: its weights are noise of a known size."""

    def __init__(self, config: object, name: str) -> None:
        self._version = 0

    def snapshot(self) -> WeightSnapshot:
        self._version += 1
        buffer = np.random.default_rng(self._version).integers(0, 256, WEIGHTS, np.uint8)
        return WeightSnapshot(version=self._version, manifest=b"", buffer=buffer)


class Source:
    """A sampler: its images are noise of a known size."""

    def __init__(self, config: object, name: str) -> None:
        self._version = 0

    def load_weights(self, snapshot: WeightSnapshot) -> int:
        assert snapshot.buffer.nbytes == WEIGHTS
        self._version = snapshot.version
        return self._version

    def sample(self, requests: list[SampleRequest]) -> list[RolloutGroup]:
        return [drawn(request, self._version) for request in requests]

    def images(self, group: RolloutGroup) -> tuple[np.ndarray, Span]:
        noise = np.random.default_rng(group.request.group).integers(0, 256, IMAGES, np.uint8)
        return noise, Span("sampler", "decode", 0.0, 0.0)


class Reader:
    """A reward server: the sum of what it gets, under the name of its pool."""

    def __init__(self, config: str, name: str) -> None:
        self._score = config

    def score(self, request: SampleRequest, images: np.ndarray) -> GroupScores:
        total = np.array([images.sum()], np.float32)
        return GroupScores(
            key=request.key, scores={self._score: total}, features={}, errors=(None,)
        )


def plan() -> FleetPlan:
    """The host with a GPU has all but the samplers, for which it has too few CPUs."""
    here = Resources(num_cpus=0.01, num_gpus=0.1)

    def pool(name: str) -> Role:
        panels = () if name == "server" else ("rewards",)
        return Role(
            name=f"reward-{name}", factory=Reader, config=name, resources=here, count=SERVERS,
            panels=panels, scorers={"rewards": (name,)},
        )  # fmt: skip

    return FleetPlan(
        sampler=Role(
            name="sampler", factory=Source, config=None, resources=Resources(num_cpus=1.5),
            count=SAMPLERS,
        ),
        reward_server=pool("server"),
        reward_pools=(pool("other"),),
        moments_server=Role(name="moments-server", factory=Idle, config=None, resources=here),
        learner=Role(name="learner", factory=Sender, config=None, resources=here),
        timeout_s=START_S,
        slots=GROUPS,
    )  # fmt: skip


def loaded(fleet: RayFleet, version: int) -> bool:
    samplers = [] if fleet._broadcaster.under_way else fleet.pools[0].of(State.SERVING)
    return len(samplers) == SAMPLERS and all(s.weight_version == version for s in samplers)


def serve(fleet: RayFleet) -> None:
    version = 0
    for line in sys.stdin:
        match line.strip():
            case "weights":
                version += 1
                fleet.broadcast(version)
                deadline = time.monotonic() + START_S
                while not loaded(fleet, version):
                    assert time.monotonic() < deadline
                    fleet._poll()
            case "images":
                scored = fleet.collect(fleet.submit(requests(GROUPS)))
                assert all({*group.scores.scores} == {"server", "other"} for group in scored)
        print("done", flush=True)


if __name__ == "__main__":
    from tests.distributed.hosts import counted  # its classes under their own name

    with (
        RaySession(RayConfig(address=sys.argv[1])) as session,
        RayFleet(counted.plan(), session) as fleet,
    ):
        print("done", flush=True)
        counted.serve(fleet)
