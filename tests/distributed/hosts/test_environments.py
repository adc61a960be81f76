"""Two runs at once on one cluster of hosts as they come: IPv6 alone, clocks minutes apart, proxies
that lead nowhere, a /dev/shm of 64 MB as Docker makes it, and another user on the same machine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from learner.run import main
from tests.distributed.hosts.cluster import HostCluster
from tests.distributed.hosts.network import Host, Network, why_not
from tests.small_run import flags, recorded

PROXIES = {
    name: "http://10.99.99.99:3128"
    for lower in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
    for name in (lower, lower.upper())
}
AHEAD_S = 420
CLOCK = f"""
import time
machine = time.time
time.time = lambda: machine() + {AHEAD_S}
"""
NOBODY = 65534
OPTIONS = [*flags(), "--groups-per-iteration", "2", "--learner.schedule", "constant",
           "--evaluation.num-images", "0", "--output.gallery-every", "0",
           "--output.checkpoint-every", "1000"]  # fmt: skip
ENDLESS = ["--iterations", "1000", "--rewards.extra", "tests.stand_ins:Brightness=0.0,seconds=0.5"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[HostCluster]:
    if reason := why_not():
        pytest.skip(f"several hosts: {reason}")
    with Network(2, shm_mb=64, ipv6=True) as network, HostCluster(network, cpus=2) as cluster:
        (network.shared / "sitecustomize.py").write_text(CLOCK)
        cluster.start_head(env=PROXIES)
        cluster.join(network.hosts[1], env=PROXIES | ahead(cluster))
        yield cluster


def ahead(cluster: HostCluster) -> dict[str, str]:
    """Environment of Pythons whose clock is that of the second host. (libfaketime shifts other
    programs' clocks, too, but Ray's waits for threads then end at once.)"""
    return {"PYTHONPATH": str(cluster.network.shared)}


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
    deadline = time.monotonic() + 300
    while True:
        done = command(cluster, host, "cluster.status", "--all", "--json")
        if done.returncode == 0:  # a busy machine's head may take seconds to answer
            found: dict[str, Any] = json.loads(done.stdout)
            found["runs"] = {run["run"]: run for run in found["runs"]}
            if ready(found["runs"]):
                return found
        assert time.monotonic() < deadline, done.stdout + done.stderr
        time.sleep(0.5)


def alone(folder: Path, seed: int, iterations: int) -> list[tuple]:
    """The first iterations of a run, in this process."""
    extra = ["--rewards.extra", "tests.stand_ins:Brightness=0.0"]
    line = [*OPTIONS, *extra, "--seed", str(seed), "--iterations", str(iterations), "--inline"]
    assert main([*line, "--run-dir", str(folder)]) == 0
    return recorded(folder)


def seconds_of(run: Path) -> float:
    """From the first to the last time in its trace."""
    events = [
        json.loads(line.rstrip(","))
        for line in (run / "trace.json").read_text().splitlines()
        if '"ts"' in line
    ]
    starts = [event["ts"] for event in events]
    return (max(event["ts"] + event.get("dur", 0) for event in events) - min(starts)) / 1e6


CHECK = """
import sys
from cluster.errors import TesseraError
from cluster.ray_session.session import RayConfig, check_ray
for address in sys.argv[1:]:
    try:
        check_ray(RayConfig(address=address))
    except TesseraError as error:
        print(error)
    else:
        print("may join", address)
"""


def test_another_user_of_a_host_is_told_whose_the_cluster_is(cluster: HostCluster) -> None:
    """Who is not root, but may read the interpreter and the token, wherever they are."""
    host = cluster.network.hosts[0]
    reads = [f"--{kind}-caps=+dac_read_search" for kind in ("inh", "ambient")]
    user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *reads]
    line = [sys.executable, "-c", CHECK, "host-1:6379", f"[{host.address}]:6379", "auto"]
    mine = host.run(line, cluster.environment | PROXIES)
    assert mine.stdout.count("may join") == 3, mine.stdout + mine.stderr
    other = host.run([*user, *line], cluster.environment | PROXIES | {"HOME": "/tmp"})
    named, by_number, auto = other.stdout.splitlines()
    for told in (named, by_number):
        assert "on this machine belongs to root, and its socket /tmp/ray/session_" in told
        assert "cannot be opened by nobody: run on the cluster by `ray job submit`" in told
    assert f"belongs to others ({cluster.address}, of root)" in auto


STORE = """
import numpy as np, ray
from cluster.ray_session.session import RayConfig, RaySession
with RaySession(RayConfig(num_cpus=1, object_store_memory=0.2)):
    total = ray.remote(lambda images: int(images.sum()))
    print(ray.get(total.remote(ray.put(np.ones(100_000_000, np.uint8))), timeout=60))
"""


@pytest.mark.slow
def test_a_private_ray_on_a_host_as_it_comes(cluster: HostCluster) -> None:
    """With IPv6 alone it is refused, and works as the error says. Where /dev/shm is too small, or
    full, its store is elsewhere."""
    host = cluster.network.hosts[1]
    refused = host.run([sys.executable, "-c", STORE], PROXIES)
    assert "this machine has IPv6 addresses alone" in refused.stderr
    host.run(["ip", "address", "add", "192.0.2.1/32", "dev", "lo"])
    for filled_mb, free in ((0, "67.1 MB"), (64, "0 MB")):
        host.run(["dd", "if=/dev/zero", "of=/dev/shm/others", "bs=1M", f"count={filled_mb}"])
        done = host.run([sys.executable, "-c", STORE], PROXIES)
        host.run(["rm", "/dev/shm/others"])
        assert done.stdout == "100000000\n", done.stderr
        assert f"/dev/shm has room for {free}, less than Ray's object store" in done.stderr
    host.run(["ip", "address", "delete", "192.0.2.1/32", "dev", "lo"])


@pytest.mark.slow
def test_two_runs_at_once_do_not_touch_each_other(cluster: HostCluster, tmp_path: Path) -> None:
    """One is driven from the host that is ahead, one is a job from outside. Each is stopped by its
    name, and has the numbers that it has alone."""
    first, second = cluster.network.hosts
    night, evening = (cluster.network.shared / name for name in ("night", "evening"))
    line = [sys.executable, "-m", "learner.run", *OPTIONS, *ENDLESS, "--quota.cpus", "2"]
    driver = second.popen(
        [*line, "--ray.address", "auto", "--seed", "3", "--run-dir", str(night)],
        cluster.environment | PROXIES | ahead(cluster),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    direct = PROXIES | cluster.environment | {"no_proxy": first.address, "NO_PROXY": first.address}
    job = [*line, "--seed", "4", "--run-dir", str(evening)]
    submitted = cluster.submit(job, options=["--no-wait"], env=direct)
    assert submitted.returncode == 0, submitted.stdout

    def both(runs: dict[str, Any]) -> bool:
        assert driver.poll() is None, driver.communicate()[0]
        return {"night", "evening"} == {name for name, run in runs.items() if run["iteration"]}

    found = statuses(cluster, first, both)
    runs = found["runs"]
    assert [runs[name]["host"] for name in ("night", "evening")] == [second.name, first.name]
    for run in runs.values():
        assert run["user"] == "root"
        assert 0 < run["cpus"] <= run["quota_cpus"] == 2
        assert run["workers"] == {
            "sampler": 2,
            "reward-server": 1,
            "learner": 1,
            "moments-server": 1,
        }
    assert found["cpus"] == 4
    which = command(cluster, first, "cluster.stop")
    assert which.returncode == 1
    assert "several runs are active: choose one with --run (evening, night)" in which.stderr
    more = command(cluster, first, "cluster.scale", "--run", "night", "--samplers", "9")
    assert more.returncode == 1
    assert "its quota is 2 CPUs" in more.stderr
    stopped = command(cluster, second, "cluster.stop", "--run", "night")
    assert stopped.returncode == 0, stopped.stderr
    said, _ = driver.communicate(timeout=60)
    before = statuses(cluster, first, lambda runs: "night" not in runs)["runs"]["evening"]
    statuses(cluster, first, lambda runs: runs["evening"]["iteration"] > before["iteration"])
    stopped = command(cluster, first, "cluster.stop", "--run", "evening")
    assert stopped.returncode == 0, stopped.stderr
    assert statuses(cluster, second, lambda runs: True)["runs"] == {}
    for run, seed in ((night, 3), (evening, 4)):
        done = recorded(run)
        assert done, said
        assert done == alone(tmp_path / run.name, seed, len(done))
        # the workers on the other host, too, are where the driver's clock has them
        assert seconds_of(run) < AHEAD_S / 2
        assert "asked to stop" in (run / "run.log").read_text()
