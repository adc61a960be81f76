"""A cluster of three unlike nodes, and fleets that are placed on it or refused.

`python -m tests.distributed.placement.placing` prints what happened as JSON. It is a program, since
it starts a Ray cluster of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from cluster.errors import ConfigError
from cluster.placement.config import PlacementConfig
from cluster.placement.nodes import UNITS, Node, Request
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_backend.placement_groups import PlacementGroups
from cluster.ray_session.private import call_inside, free_per_node
from cluster.ray_session.session import RayConfig, RaySession
from cluster.roles import FleetPlan, Resources, Role
from cluster.scheduling.pool import State, Worker, WorkerPool
from tests.distributed.failures.kills import pid_of
from tests.distributed.stubs import START_S, Slow
from tests.logged import messages

SETTLED_S = 60.0
ROLE = "tessera-role"


def plan(samplers: int = 2, servers: int = 2, **changed: Any) -> FleetPlan:
    """Samplers with .75 of a GPU, reward servers with .25."""

    def role(name: str, resources: Resources, count: int = 1) -> Role:
        config = (0.0,) * (count + 2)  # of added ones, too
        return Role(name=name, factory=Slow, config=config, resources=resources, count=count)

    return FleetPlan(
        sampler=role("sampler", Resources(num_cpus=0.5, num_gpus=0.75), samplers),
        reward_server=role("reward-server", Resources(num_cpus=0.2, num_gpus=0.25), servers),
        moments_server=role("moments-server", Resources(num_cpus=0.1, labels={ROLE: "!gpu"})),
        learner=role("learner", Resources(num_cpus=0.1, num_gpus=1, accelerator_type="H100")),
        timeout_s=START_S,
        placement=PlacementConfig(**{"wait_s": 10.0, **changed}),
    )


def node_of(worker: Worker) -> str:
    return ray.get(call_inside(worker.handle, lambda _: ray.get_runtime_context().get_node_id()))


def reserved(session: RaySession) -> list[list[float]]:
    """CPUs and GPUs that are in use on each node, in the order of their names below."""
    by_id = {node.id: node.used for node in session.nodes}
    return [[by_id[key].get(name, 0.0) for name in ("CPU", "GPU")] for key in NAMES]


def until(session: RaySession, expected: Sequence[Sequence[float]]) -> list[list[float]]:
    deadline = time.monotonic() + SETTLED_S
    while (found := reserved(session)) != expected and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def serving(pool: WorkerPool, index: int) -> bool:
    return pool.workers[index].state is State.SERVING


def poll_until(fleet: RayFleet, done: Callable[[], bool], said: list[str]) -> None:
    deadline = time.monotonic() + SETTLED_S
    while not done():
        assert time.monotonic() < deadline, said
        fleet._poll()


def living_groups() -> int:
    return sum(entry["state"] != "REMOVED" for entry in placement_group_table().values())


NAMES: dict[str, str] = {}
"""Id of a node -> its name."""
NOTHING = [[0.0, 0.0]] * 3


def placed(session: RaySession) -> dict[str, Any]:
    """A fleet is where its options say; a replacement, an added worker, the end."""
    found: dict[str, Any] = {}
    together = plan(samplers_with_reward_servers=True)
    with messages() as said, RayFleet(together, session) as fleet:
        found["nodes"] = {worker.name: NAMES[node_of(worker)] for worker in fleet._all()}
        found["groups"], found["reserved"] = living_groups(), reserved(session)
        samplers, servers = fleet.pools
        lost = samplers.workers[1]
        os.kill(pid_of(lost), signal.SIGKILL)
        poll_until(fleet, lambda: samplers.workers[1] is not lost and serving(samplers, 1), said)
        found["replaced"] = NAMES[node_of(samplers.workers[1])]
        found["reserved again"], found["groups again"] = reserved(session), living_groups()
        servers.scale(3)
        poll_until(fleet, lambda: serving(servers, 2), said)
        found["added"] = NAMES[node_of(servers.workers[2])]
        samplers.scale(4)
        found["waits"] = [worker.waits_for for worker in samplers.workers]
        found["said"] = [line for line in said if "waits for room" in line]
        samplers.scale(2)
        servers.scale(2)
        poll_until(fleet, lambda: len(samplers.workers) == len(servers.workers) == 2, said)
        fleet._launcher.keep({worker.name for worker in fleet._all()})
        found["scaled back"] = until(session, found["reserved"])
    found["at the end"], found["groups left"] = until(session, NOTHING), living_groups()
    return found


def refused(session: RaySession, asked: FleetPlan) -> dict[str, Any]:
    began = time.monotonic()
    try:
        with RayFleet(asked, session):
            why = ""
    except ConfigError as error:
        why = str(error)
    return {"why": why, "seconds": time.monotonic() - began, "groups": living_groups()}


class Outdated(RaySession):
    """Of a session whose cluster is given to others between the look at it and the reservation."""

    def __init__(self, session: RaySession, nodes: Sequence[Node]) -> None:
        self._nodes, self._looks = nodes, 0
        self.joined = session.joined

    @property
    def nodes(self) -> list[Node]:
        self._looks += 1
        return list(self._nodes) if self._looks == 1 else super().nodes


def taken_meanwhile(session: RaySession) -> dict[str, Any]:
    empty = session.nodes
    other = PlacementGroups()
    other.reserve([(Request(name, "other", UNITS // 10, UNITS),) for name in ("a", "b")], [])
    late = other.wait(10.0)
    try:
        found = refused(Outdated(session, empty), plan(wait_s=2.0))  # type: ignore[arg-type]
    finally:
        other.end()
    return {**found, "others": [str(gang) for gang in late]}


def driver_killed(session: RaySession) -> Mapping[str, Any]:
    """What a driver had reserved is free after its kill."""
    code = (
        "import time, sys\n"
        "from tests.distributed.placement.placing import PlacementGroups, Request, UNITS\n"
        "from cluster.ray_session.session import RayConfig, RaySession\n"
        "with RaySession(RayConfig(address=sys.argv[1])):\n"
        "    groups = PlacementGroups()\n"
        "    groups.reserve([(Request('a', 'a', UNITS // 2, UNITS),)], [])\n"
        "    print(groups.wait(30), flush=True)\n"
        "    time.sleep(600)\n"
    )
    until(session, NOTHING)
    command = [sys.executable, "-c", code, session.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        answer = driver.stdout.readline().strip()
        held = sum(gpus for _, gpus in reserved(session))
        driver.kill()
    return {"late": answer, "held": held, "left": until(session, NOTHING)}


def main() -> dict[str, Any]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    gpu = cluster.add_node(num_cpus=3, num_gpus=3, labels={ROLE: "gpu"})
    learner = cluster.add_node(
        num_cpus=1, num_gpus=1, labels={ROLE: "gpu"}, resources={"accelerator_type:H100": 1}
    )
    NAMES.update(
        {cluster.head_node.node_id: "head", gpu.node_id: "gpu", learner.node_id: "learner"}
    )
    found: dict[str, Any] = {}
    try:
        with RaySession(RayConfig(address=cluster.address)) as session:
            found["placed"] = placed(session)
            one = plan()
            sampler = replace(one.sampler, resources=Resources(labels={ROLE: "gpus"}))
            found["no label"] = refused(session, replace(one, sampler=sampler))
            found["no pair"] = refused(session, plan(4, 4, samplers_with_reward_servers=True))
            found["taken"] = taken_meanwhile(session)
            found["killed"] = driver_killed(session)
            assert free_per_node().keys() == NAMES.keys()
    finally:
        cluster.shutdown()
    return found


if __name__ == "__main__":
    # Imported under its own name, so that workers find its classes.
    from tests.distributed.placement import placing

    print(json.dumps(placing.main()))
