"""No storage is shared but a URL: a run is stopped, and resumed on another host with an empty disk.

The head has no CPUs for workers, so the learner is never on the driver's host: its files of
checkpoints go through Ray. The URL is of an S3-compatible server (moto) on a host outside the
cluster.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.hosts.cluster import HostCluster
from tests.distributed.hosts.network import Host
from tests.distributed.hosts.runs import ITERATIONS, CalmRun, differences, job, result

RUN = Path("/tmp/runs/first")  # a folder of its own on each host
PORT = 5000
KEYS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_REGION": "us-east-1"}
SERVER = """
import sys
from urllib.request import Request, urlopen
from moto.server import ThreadedMotoServer
address, port = sys.argv[1], int(sys.argv[2])
server = ThreadedMotoServer(address, port, verbose=False)
server.start()
urlopen(Request(f"http://{address}:{port}/bucket", method="PUT")).read()
print("up", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def url(cluster: HostCluster) -> Iterator[str]:
    """Where checkpoints go."""
    host = cluster.network.outside
    line = [sys.executable, "-c", SERVER, host.address, str(PORT)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with host.popen(line, KEYS, **pipes) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "up\n"
        yield f"s3://bucket/first?scheme=http&endpoint_override={host.address}:{PORT}"
        server.kill()


def submit(cluster: HostCluster, host: Host, command: list[str]) -> str:
    """A job whose driver is on a host; its output."""
    options = ["--runtime-env-json", json.dumps({"env_vars": KEYS})]
    options += ["--entrypoint-resources", json.dumps({host.name: 0.01})]
    done = cluster.submit(command, options=options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def result_on(cluster: HostCluster, host: Host) -> dict[str, Any]:
    """Of the run directory on a host, which this process does not see."""
    copy = cluster.network.shared / f"copy-of-{host.name}"
    done = host.run(["cp", "-r", str(RUN), str(copy)])
    assert done.returncode == 0, done.stderr
    return result(copy)


def test_a_run_goes_on_from_its_url_on_another_host(
    cluster: HostCluster, calm: CalmRun, url: str
) -> None:
    first, _, third = cluster.network.hosts
    stop = ITERATIONS // 2
    command = job(RUN, "--auto-resume", "--output.checkpoint-url", url)
    begun = submit(cluster, first, [*command, "--iterations", str(stop)])
    assert f"the learner is on a node that does not see {RUN}/checkpoints" in begun
    assert "resumed" not in begun
    assert third.run(["ls", str(RUN)]).returncode != 0
    resumed = submit(cluster, third, command)
    assert f"resumed from step_{stop:06d}" in resumed

    before, after, expected = result_on(cluster, first), result_on(cluster, third), calm.result
    assert before["metrics"] == expected["metrics"][:stop]
    assert after["metrics"] == expected["metrics"][stop:]
    assert {*before} | {*after} == {*expected}
    rollouts = [name for name in before if ".parquet" in name]
    assert rollouts
    assert [name for name in rollouts if before[name] != expected[name]] == []
    assert differences(after, {name: expected[name] for name in after}) == ["metrics"]
