"""Where the driver saturates, in simulated runs of many workers: the real main loop and fleet.

python -m tests.bench.simulation [--samplers 1 4 16 64 256 1024] [--together 1 8] [--groups 4096]

Workers take the seconds of LlamaGen-L on an H200 by the arithmetic of `learner.plan`, but for the
learner, which takes `--learn` seconds an iteration, so that it does not hide the others. There is
half a reward server to a sampler. The driver's time is what its code takes here, plus the CPU time
of Ray's client for each call (`RAY_CLIENT`).
"""

from __future__ import annotations

import argparse
import os
import time

from cluster.simulation.specification import RAY_CLIENT, Host, SimulatedCluster
from learner.capacity.service_times import ServiceTimes
from learner.capacity.simulation import SimulatedRun, simulate
from learner.config import RunConfig
from tests.small_run import small_config

ROLLOUTS = 12
TIMES = {
    "sample": 0.035,
    "images": 0.0102,
    "score": {"reward-server": 0.0225},
    "commit": 0.2,
    "publish": 0.08,
    "load": 0.08,
    "record": 0.0,
    "driver": 0.0,
    "image_bytes": 2359296.0,
    "rollout_bytes": 36864.0,
    "snapshot_bytes": 685821952.0,
}
"""`learner.plan --preset paper-llamagen-l-256 --gpu h200`, 2026-11-29."""
GPUS, LINK = 8, 12.5e9  # of a host; bytes/s


def configured(samplers: int, servers: int, groups: int, together: int) -> RunConfig:
    return small_config(
        groups_per_iteration=groups,
        rollouts_per_group=ROLLOUTS,
        num_samplers=samplers,
        num_reward_servers=servers,
        sampler={"num_gpus": 1, "max_groups": together},
        reward={"num_gpus": 1},
        learner={"num_gpus": 1},
        rewards={"hps": {"enabled": False}},
        max_staleness=1,
    )


def run(samplers: int, groups: int, together: int, learn: float) -> tuple[SimulatedRun, float]:
    """A run, and the seconds of CPU that its simulation took."""
    servers = -(-samplers // 2)
    hosts = (Host(cpus=64, gpus=GPUS),) * -(-(samplers + servers + 1) // GPUS)
    cluster = SimulatedCluster(hosts=hosts, link_bytes_per_s=LINK, driver=RAY_CLIENT)
    config = configured(samplers, servers, groups, together)
    began = time.process_time()
    found = simulate(config, ServiceTimes(**TIMES, learn=learn), cluster, iterations=3)
    return found, time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samplers", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--together", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--groups", type=int, default=4096)
    parser.add_argument("--learn", type=float, default=1.0)
    options = parser.parse_args()
    for together in options.together:
        for samplers in options.samplers:
            found, cpu_s = run(samplers, options.groups, together, options.learn)
            took = sum(found.seconds) / len(found.seconds)
            shares = ", ".join(f"{role} {use:.0%}" for role, use in found.utilisation.items())
            print(
                f"{samplers:5d} samplers, {together} groups a call: {took:8.2f} s an iteration, "
                f"{found.images / took:7.0f} images/s, driver {found.driver_ms_per_group:.2f} ms a "
                f"group; busy: {shares}; {cpu_s:.0f} s to simulate",
                flush=True,
            )
            of = f"{samplers}_samplers_{together}_groups_a_call"
            print(f"RESULT simulation.images_per_s_{of}={found.images / took:.0f}")
            print(f"RESULT simulation.driver_ms_{of}={found.driver_ms_per_group:.2f}")
    print(f"load at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
