"""A cluster of two nodes that loses one in the middle of its work, and gets another one later.

`python -m tests.distributed.failures.node_loss PART [DIRECTORY]` prints what happened as JSON. It
is a program, since it starts a Ray cluster of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # not where a test imports this: the Ray of other tests is patient
    # How soon Ray takes a node for lost. One that is gone refuses each check at once; one that is
    # merely slow has time to answer.
    QUICK = {"initial_delay_ms": 1000, "period_ms": 1000, "timeout_ms": 10_000}
    for name, value in {**QUICK, "failure_threshold": 3}.items():
        os.environ[f"RAY_health_check_{name}"] = str(value)

import ray
from ray.cluster_utils import Cluster

from cluster.messages import ScoredGroup
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.private import call_inside
from cluster.ray_session.session import RayConfig, RaySession
from cluster.roles import FleetPlan, Resources, Role
from cluster.scheduling.pool import State, Worker
from tests.distributed.failures.kills import once, when_asked_for
from tests.distributed.stubs import START_S, Slow, requests
from tests.logged import messages

GROUPS, GROUP_S = 12, 0.5
ITERATIONS, LOST, BACK = 6, 2, 4
GROWTH_S = 120.0


def stub_plan(head_gpus: float = 0.0, seconds: float = GROUP_S) -> FleetPlan:
    """Samplers and reward servers of which a node holds one each; a group takes `seconds`.

    Args:
        head_gpus: GPUs of the head alone, which hold the roles that exist once there.
    """

    def role(name: str, resources: Resources, count: int = 1, seconds: float = 0.0) -> Role:
        config = (seconds,) * count
        return Role(name=name, factory=Slow, config=config, resources=resources, count=count)

    single = Resources(num_cpus=0.01, num_gpus=head_gpus / 2)
    return FleetPlan(
        sampler=role("sampler", Resources(num_cpus=0.6), 2, seconds),
        reward_server=role("reward-server", Resources(num_cpus=0.3), 2),
        moments_server=role("moments-server", single),
        learner=role("learner", single),
        timeout_s=START_S,
        max_restarts=20,
    )


def facts(groups: Sequence[ScoredGroup]) -> list[list[float]]:
    """What equal groups have in common."""
    return [
        [float(group.rollouts.tokens[0, 0]), float(group.scores.scores["score"][0])]
        for group in groups
    ]


def node_of(worker: Worker) -> str:
    return ray.get(call_inside(worker.handle, lambda _: ray.get_runtime_context().get_node_id()))


def serving(fleet: RayFleet) -> list[int]:
    return [len(pool.of(State.SERVING)) for pool in fleet.pools]


def until_serving(fleet: RayFleet, count: int, said: list[str]) -> list[int]:
    """Wait until every pool has so many workers."""
    deadline = time.monotonic() + GROWTH_S
    while any(found != count for found in serving(fleet)):
        assert time.monotonic() < deadline, said
        fleet._poll()
    return serving(fleet)


def batches() -> dict[str, Any]:
    """Three batches of stubs: with two nodes, with one of them lost meanwhile, with a new one."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1})
    second = cluster.add_node(num_cpus=1)
    with messages() as said, RaySession(RayConfig(address=cluster.address)) as session:
        found: dict[str, Any] = {"nodes": sorted((n.gpus, n.cpus) for n in session.nodes)}
        with RayFleet(stub_plan(head_gpus=1), session) as fleet:
            fleet.broadcast(1)
            found["before"] = facts(fleet.collect(fleet.submit(requests(GROUPS))))
            lost = [worker for worker in fleet._all() if node_of(worker) == second.node_id]
            batch = fleet.submit(requests(GROUPS))
            busy = [call.worker for call in fleet._calls.values() if call.worker in lost]
            cluster.remove_node(second, allow_graceful=False)
            found["during"] = facts(fleet.collect(batch))
            found["serving_without"] = until_serving(fleet, 1, said)
            cluster.add_node(num_cpus=1)
            found["serving_at_last"] = until_serving(fleet, 2, said)
            found["after"] = facts(fleet.collect(fleet.submit(requests(GROUPS))))
            found |= {"lost": [w.name for w in lost], "busy": [w.name for w in busy]}
            found["restarts"] = fleet.restarts
    cluster.shutdown()
    return found


def changed_options() -> dict[str, Any]:
    from tests.distributed.failures.test_lost_workers import OPTIONS

    return {**OPTIONS, "iterations": ITERATIONS}


def run(directory: Path) -> dict[str, Any]:
    """A whole run, whose groups and weights are real."""
    from learner.fleet_plan import fleet_plan
    from tests.distributed.failures.test_lost_workers import run_whole
    from tests.small_run import small_config

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    second = cluster.add_node(num_cpus=2)
    config = small_config(**changed_options())
    with (
        messages() as said,
        RaySession(RayConfig(address=cluster.address)) as session,
        RayFleet(fleet_plan(config), session) as fleet,
    ):
        found = {"lost": [w.name for w in fleet._all() if node_of(w) == second.node_id]}
        when_asked_for(fleet, LOST, once(lambda: cluster.remove_node(second, allow_graceful=False)))
        when_asked_for(fleet, BACK, once(lambda: cluster.add_node(num_cpus=2)))
        run_whole(config, fleet, directory / "run")
        found["serving_at_last"] = until_serving(fleet, 2, said)
    cluster.shutdown()
    return found


if __name__ == "__main__":
    # Imported under its own name, so that workers find its classes.
    from tests.distributed.failures import node_loss

    parts = {"batches": node_loss.batches, "run": node_loss.run}
    print(json.dumps(parts[sys.argv[1]](*map(Path, sys.argv[2:]))))
