"""New weights between hosts: each link carries them once, whoever is lost on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.bench.links import Driver
from tests.distributed.hosts.cluster import HostCluster
from tests.distributed.hosts.network import Network

MEGABYTES, GIGABITS = 64, 0.2  # 2.6 s: all else counts for little, on a busy machine too
HEADERS = 0.06  # of packets, and Ray's own messages


@pytest.fixture(scope="module")
def driver(network: Network) -> Iterator[Driver]:
    with HostCluster(network) as cluster:
        cluster.start(object_store_memory=400_000_000)
        with Driver(cluster, MEGABYTES, samplers=2) as driver:
            for host in network.hosts:
                host.limit(GIGABITS * 1e9)
            yield driver


def test_every_link_carries_weights_once(driver: Driver) -> None:
    for _ in range(2):  # the first one's size is not known before
        found = driver.broadcast("pieces")
        assert 1 <= found.sent < 1 + HEADERS
        assert all(1 <= each < 1 + HEADERS for each in found.received)


@pytest.mark.slow  # a time, which tests beside it change
def test_the_link_is_in_use(driver: Driver) -> None:
    shares = [driver.broadcast("pieces").share(GIGABITS) for _ in range(3)]
    assert max(shares) > 0.6  # if each host fetched them, the learner's link would leave 0.48


def test_a_host_that_is_lost_is_passed_by(driver: Driver, network: Network) -> None:
    """The host that passes the weights on is lost in their middle: the other one takes what is left
    from the learner's."""
    driver.begin("pieces")
    time.sleep(1.2)
    network.hosts[1].kill()
    found = driver.end()
    assert found.lost == 2  # its own samplers
    assert 1 <= found.received[1] < 2
