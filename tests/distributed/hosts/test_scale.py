"""Numbers of workers and of hosts change nothing: rollouts, rewards, moments and policy are equal
bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from learner.run import main
from tests.distributed.hosts.cluster import HostCluster
from tests.distributed.hosts.network import Network
from tests.distributed.hosts.runs import COMMAND, CalmRun, differences, job, result

SAMPLERS, SERVERS, HOSTS = (1, 2, 8), (1, 2, 4), (1, 3)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A run in one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert main([*job(run)[len(COMMAND) :], "--inline"]) == 0
    return result(run)


def test_three_hosts_compute_what_one_process_does(calm: CalmRun, alone: dict[str, object]) -> None:
    assert differences(alone, calm.result) == []


@pytest.fixture(scope="module")
def one_host(network: Network) -> Iterator[HostCluster]:
    with HostCluster(network, cpus=2) as cluster:
        cluster.start_head()
        yield cluster


@pytest.mark.slow  # eighteen runs
@pytest.mark.parametrize(
    ("samplers", "servers", "hosts"), [*itertools.product(SAMPLERS, SERVERS, HOSTS)]
)
def test_any_numbers_of_workers_and_hosts(
    samplers: int,
    servers: int,
    hosts: int,
    alone: dict[str, object],
    request: pytest.FixtureRequest,
) -> None:
    cluster = request.getfixturevalue("one_host" if hosts == 1 else "cluster")
    run: Path = cluster.network.shared / f"{samplers}x{servers}"
    numbers = ["--num-samplers", str(samplers), "--num-reward-servers", str(servers)]
    done = cluster.submit(job(run, *numbers), timeout=600)
    assert done.returncode == 0, done.stdout
    assert differences(alone, result(run)) == []
