"""A cluster of two nodes that loses one in the middle of a run, and gets another one later.

`python -m tests.distributed.failures.node_loss DIRECTORY` prints what happened as JSON. It is a
program, since it starts a Ray cluster of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

QUICK = {"initial_delay_ms": 1000, "period_ms": 1000, "timeout_ms": 2000, "failure_threshold": 3}
for name, value in QUICK.items():  # how soon Ray takes a silent node for lost
    os.environ[f"RAY_health_check_{name}"] = str(value)

import ray  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from cluster.ray_backend.fleet import RayFleet  # noqa: E402
from cluster.ray_session.private import call_inside  # noqa: E402
from cluster.ray_session.session import RayConfig, RaySession  # noqa: E402
from cluster.scheduling.pool import State, Worker  # noqa: E402
from learner.fleet_plan import fleet_plan  # noqa: E402
from tests.distributed.failures.kills import once, when_asked_for  # noqa: E402
from tests.distributed.failures.test_lost_workers import OPTIONS, run_whole  # noqa: E402
from tests.logged import messages  # noqa: E402
from tests.small_run import small_config  # noqa: E402

ITERATIONS, LOST, BACK = 6, 2, 4
GROWTH_S = 120.0


def node_of(worker: Worker) -> str:
    return ray.get(call_inside(worker.handle, lambda _: ray.get_runtime_context().get_node_id()))


def changed_options() -> dict[str, Any]:
    return {**OPTIONS, "iterations": ITERATIONS}


def main(directory: Path) -> dict[str, Any]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    second = cluster.add_node(num_cpus=2)
    config = small_config(**changed_options())
    with (
        messages() as said,
        RaySession(RayConfig(address=cluster.address)) as session,
        RayFleet(fleet_plan(config), session) as fleet,
    ):
        found: dict[str, Any] = {"said": said}
        lost = [w.name for w in fleet._all() if node_of(w) == second.node_id]

        def lose() -> None:
            found["at"] = time.monotonic()
            cluster.remove_node(second, allow_graceful=False)

        def come_back() -> None:
            found["serving_without"] = [len(pool.of(State.SERVING)) for pool in fleet.pools]
            cluster.add_node(num_cpus=2)

        when_asked_for(fleet, LOST, once(lose))
        when_asked_for(fleet, BACK, once(come_back))
        run_whole(config, fleet, directory / "run")
        found["seconds"] = time.monotonic() - found.pop("at")
        deadline = time.monotonic() + GROWTH_S
        while any(len(p.of(State.SERVING)) < 2 for p in fleet.pools):
            assert time.monotonic() < deadline, said
            fleet._poll()
        found["serving_at_last"] = [len(pool.of(State.SERVING)) for pool in fleet.pools]
        found["lost"] = lost
    cluster.shutdown()
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
