"""Three hosts for the tests of a module, and one cluster on three others for all that run jobs of
the miniature; skipped by name where the machine permits none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.hosts.cluster import HostCluster
from tests.distributed.hosts.network import Network, why_not
from tests.distributed.hosts.runs import CalmRun


@pytest.fixture(scope="session")
def _permitted() -> None:
    if reason := why_not():
        pytest.skip(f"several hosts: {reason}")


@pytest.fixture(scope="module")
def network(_permitted: None) -> Iterator[Network]:
    with Network() as network:
        yield network


@pytest.fixture(scope="session")
def cluster(_permitted: None) -> Iterator[HostCluster]:
    """A cluster whose head has no CPUs for workers, as in production: driver and learner are on
    different hosts."""
    with Network() as network, HostCluster(network, cpus=(0, 2, 2)) as cluster:
        yield cluster.start()


@pytest.fixture(scope="session")
def calm(cluster: HostCluster) -> CalmRun:
    """A job without failures, which the others are compared with."""
    return CalmRun.of(cluster)
