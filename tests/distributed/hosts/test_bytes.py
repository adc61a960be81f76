"""Weights and images cross a link once a host, not once a worker: bytes counted on the cables."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.distributed.hosts.cluster import HostCluster
from tests.distributed.hosts.counted import GROUPS, IMAGES, SAMPLERS, SERVERS, WEIGHTS
from tests.distributed.hosts.network import Host, Network, Program, Traffic

NOISE = 4 << 20  # bytes of Ray's own messages meanwhile
BITS = 1e9


class Fleet:
    """The program `counted` on the head, and the bytes of what it is told to do."""

    def __init__(self, network: Network, program: Program) -> None:
        self._hosts, self._program = network.hosts, program
        self._until_done()

    def traffic(self, what: str) -> list[Traffic]:
        """Of each host."""
        before = [host.traffic() for host in self._hosts]
        assert self._program.stdin is not None
        self._program.stdin.write(f"{what}\n")
        self._program.stdin.flush()
        self._until_done()
        return [host.traffic() - then for host, then in zip(self._hosts, before)]

    def _until_done(self) -> None:
        said = []
        assert self._program.stdout is not None
        for line in self._program.stdout:
            if line == "done\n":
                return
            said.append(line)
        raise AssertionError("".join(said))


@pytest.fixture(scope="module")
def fleet(network: Network) -> Iterator[Fleet]:
    head, samplers, servers = network.hosts
    with HostCluster(network, cpus=(0, 5, 1)) as cluster:
        cluster.start_head(include_dashboard=False)
        cluster.join(samplers)
        cluster.join(servers, num_gpus=1)
        for host in network.hosts:
            host.limit(BITS)
        line = [sys.executable, "-m", "tests.distributed.hosts.counted", cluster.address]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with head.popen(line, cluster.environment, **pipes) as program:
            yield Fleet(network, program)
            program.stdin.close()
            program.wait(60)


def workers(host: Host, role: str) -> int:
    return sum(f"ray::{role}" in " ".join(process.cmdline()) for process in host.processes())


def test_weights_cross_a_link_once_for_all_samplers_of_a_host(
    network: Network, fleet: Fleet
) -> None:
    assert [workers(host, "Source") for host in network.hosts] == [0, SAMPLERS, 0]
    for _ in range(2):
        head, samplers, learner = fleet.traffic("weights")
        assert WEIGHTS < samplers.received < WEIGHTS + NOISE
        assert WEIGHTS < learner.sent < WEIGHTS + NOISE
        assert head.sent + head.received < NOISE  # the driver has a reference to them alone


def test_images_cross_a_link_once_for_all_reward_servers_of_a_host(
    network: Network, fleet: Fleet
) -> None:
    assert [workers(host, "Reader") for host in network.hosts] == [0, 0, 2 * SERVERS]
    total = GROUPS * IMAGES
    head, samplers, servers = fleet.traffic("images")
    assert total < servers.received < total + NOISE
    assert total < samplers.sent < total + NOISE
    assert head.sent + head.received < NOISE
