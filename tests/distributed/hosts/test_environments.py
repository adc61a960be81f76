"""Two runs at once on one cluster of hosts as they come: IPv6 alone, clocks minutes apart, a /dev/shm
of 64 MB as Docker makes it, proxies that lead nowhere, and another user on the same machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.fleet import InlineFleet
from learner.fleet_plan import fleet_plan
from learner.monitoring.metrics import read_metrics
from tests.distributed.hosts.cluster import HostCluster
from tests.distributed.hosts.network import Host, Network, why_not
from tests.small_run import fingerprint, flags, recorded, run_training, small_config

libfaketime = pytest.importorskip("libfaketime")

PROXIES = {
    name: "http://10.99.99.99:3128"
    for lower in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
    for name in (lower, lower.upper())
}
AHEAD_S = 420
LIBRARY = Path(libfaketime.__file__).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
AHEAD = {"LD_PRELOAD": str(LIBRARY), "FAKETIME": f"+{AHEAD_S}s", "DONT_FAKE_MONOTONIC": "1"}
NOBODY = 65534
ITERATIONS = 40  # of the run that is stopped
FAST = ["--evaluation.num-images", "0", "--output.gallery-every", "0", "--quota.cpus", "2"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[HostCluster]:
    if reason := why_not():
        pytest.skip(f"several hosts: {reason}")
    with Network(2, shm_mb=64, ipv6=True) as network, HostCluster(network, cpus=2) as cluster:
        cluster.start_head(env=PROXIES)
        cluster.join(network.hosts[1], env=PROXIES | AHEAD)
        yield cluster


def command(
    cluster: HostCluster, host: Host, *line: str, **env: str
) -> subprocess.CompletedProcess[str]:
    """One of our commands on a host, with an address of which only a name is known."""
    module, *options = line
    address = ["--address", "host-1:6379"] if module.startswith("cluster.") else []
    return host.run(
        [sys.executable, "-m", module, *options, *address],
        env=cluster.environment | PROXIES | env,
        timeout=120,
    )


def statuses(cluster: HostCluster, host: Host, ready: Any) -> dict[str, Any]:
    """What `cluster.status --all` shows, once it is ready."""
    deadline = time.monotonic() + 120
    while True:
        done = command(cluster, host, "cluster.status", "--all", "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        found["runs"] = {run["run"]: run for run in found["runs"]}
        if ready(found["runs"]):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.5)


def alone(iterations: int, seed: int, count: int) -> list[tuple]:
    """The first iterations of a run in this process."""
    config = small_config(iterations=iterations, seed=seed, evaluation={"num_images": 0})
    with InlineFleet(fleet_plan(config)) as fleet:
        return fingerprint(run_training(config, fleet, lambda done: done == count))


def seconds_of(run: Path) -> float:
    """From the first to the last time in its trace."""
    events = [json.loads(line.rstrip(",")) for line in (run / "trace.json").read_text().splitlines() if "ts" in line]
    starts = [event["ts"] for event in events]
    return (max(event["ts"] + event.get("dur", 0) for event in events) - min(starts)) / 1e6


def test_two_runs_at_once_do_not_touch_each_other(cluster: HostCluster) -> None:
    """One is driven from the host that is ahead, one is a job from outside; the first is stopped by
    its name while the second goes on. Both have the numbers that each has alone."""
    first, second = cluster.network.hosts
    night, evening = (cluster.network.shared / name for name in ("night", "evening"))
    line = [sys.executable, "-m", "learner.run", *flags(), *FAST]
    driver = second.popen(
        [*line, "--ray.address", "auto", "--seed", "3", "--iterations", str(ITERATIONS),
         "--rewards.extra", "tests.stand_ins:Brightness=0.0,seconds=0.2", "--run-dir", str(night)],
        cluster.environment | PROXIES | AHEAD,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    options = ["--no-wait", "--entrypoint-num-cpus=0"]
    host = PROXIES | cluster.environment | {"no_proxy": first.address, "NO_PROXY": first.address}
    job = [*line, "--seed", "4", "--run-dir", str(evening)]
    submitted = cluster.submit(job, options=options, env=host)
    assert submitted.returncode == 0, submitted.stdout

    def both(runs: dict[str, Any]) -> bool:
        return {"night", "evening"} <= runs.keys() and all(run["workers"] for run in runs.values())

    found = statuses(cluster, first, both)
    night_run = found["runs"]["night"]
    assert (night_run["host"], night_run["user"]) == (second.name, "root")
    assert found["runs"]["evening"]["host"] == first.name
    for run in found["runs"].values():
        assert run["cpus"] <= run["quota_cpus"] == 2
    assert found["cpus"] == 4
    which = command(cluster, first, "cluster.stop")
    assert which.returncode == 1
    assert "several runs are active: choose one with --run (evening, night)" in which.stderr
    more = command(cluster, first, "cluster.scale", "--run", "night", "--samplers", "9")
    assert more.returncode == 1
    assert "its quota is 2 CPUs" in more.stderr
    stopped = command(cluster, first, "cluster.stop", "--run", "night")
    assert stopped.returncode == 0, stopped.stderr
    said, _ = driver.communicate(timeout=60)
    left = statuses(cluster, second, lambda runs: "night" not in runs)
    deadline = time.monotonic() + 60
    while "evening" in left["runs"]:
        assert time.monotonic() < deadline, left
        left = statuses(cluster, second, lambda runs: True)
    assert left["runs"] == {}
    done = recorded(night)
    assert 1 <= len(done) < ITERATIONS, said
    assert len(recorded(evening)) == 4
