"""CPU time of the driver for each group of an iteration, on real Ray with workers that compute
nothing.

python -m tests.bench.driver [--groups 256 1024 4096] [--samplers 4] [--servers 2] [--together 8]

An iteration's groups are requested at once, as in training (`submit`), or one by one as slots
become free, as in evaluations (`stream`). Each goes through all its calls: tokens, images, scores.
Counted is the CPU time of this process, with Ray's threads in it, from the request to the last
result.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from cluster.messages import SampleRequest
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session import session
from cluster.roles import FleetPlan, Resources, Role
from tests.distributed.stubs import Slow, requests


def plan(samplers: int, servers: int, slots: int, together: int) -> FleetPlan:
    def role(name: str, count: int = 1, most: int = 1) -> Role:
        return Role(
            name=name,
            factory=Slow,
            config=(0.0,) * count,
            resources=Resources(num_cpus=0.01),
            count=count,
            max_groups=most,
        )

    return FleetPlan(
        sampler=role("sampler", samplers, together),
        reward_server=role("reward-server", servers, together),
        moments_server=role("moments-server"),
        learner=role("learner"),
        slots=slots,
    )


def at_once(fleet: RayFleet, asked: list[SampleRequest]) -> int:
    return len(fleet.collect(fleet.submit(asked)))


def one_by_one(fleet: RayFleet, asked: list[SampleRequest]) -> int:
    return sum(1 for _ in fleet.stream(asked))


def cpu_ms(work: Callable[[], Any], groups: int) -> tuple[float, float]:
    """Milliseconds of CPU and of the clock for each group."""
    cpu, clock = time.process_time(), time.perf_counter()
    assert work() == groups
    return (
        (time.process_time() - cpu) / groups * 1e3,
        (time.perf_counter() - clock) / groups * 1e3,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--samplers", type=int, default=4)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--together", type=int, default=1, help="groups that a call may hold")
    options = parser.parse_args()
    config = session.RayConfig(num_cpus=2)
    most = max(options.groups)
    with session.RaySession(config) as joined:
        made = plan(options.samplers, options.servers, most, options.together)
        with RayFleet(made, joined) as fleet:
            fleet.broadcast(1)
            at_once(fleet, requests(64))  # workers are there and warm
            for name, way in {"submit": at_once, "stream": one_by_one}.items():
                found = {}
                for groups in options.groups:
                    asked = requests(groups)
                    found[groups], wall = cpu_ms(partial(way, fleet, asked), groups)
                    print(
                        f"{name:7s} {groups:6d} groups: {found[groups]:.2f} ms CPU a group, "
                        f"{wall:.2f} ms of the clock",
                        flush=True,
                    )
                print(f"RESULT driver.{name}_ms_per_group={found[most]:.2f}")
                growth = found[most] / found[min(found)]
                print(f"RESULT driver.{name}_growth={growth:.2f}")
    print(f"load at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
