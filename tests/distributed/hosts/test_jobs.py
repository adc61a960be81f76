"""`ray job submit` on three hosts with a shared run directory, calm and with failures: a cable cut
and mended, a host killed, the head killed and the job submitted again. All give the same numbers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from tests.distributed.hosts.cluster import HostCluster
from tests.distributed.hosts.network import Host
from tests.distributed.hosts.runs import (
    ITERATIONS,
    CalmRun,
    differences,
    held,
    in_log,
    job,
    result,
    roles_on,
    rows,
    start,
    until,
    until_finished,
)

NOTICED_S = 60.0  # in which a lost host is noticed
SHORT_S = 2.0  # within which it is not missed


def test_a_job_without_the_token_is_refused(cluster: HostCluster) -> None:
    refused = cluster.submit(["true"], env={})
    assert refused.returncode != 0
    assert "Missing authentication token" in refused.stdout


def test_workers_are_spread_over_the_hosts(calm: CalmRun) -> None:
    head, *others = calm.roles.values()
    assert head == []
    assert sorted(role for roles in others for role in roles) == [
        "Learner", "MomentsServer", "RewardServer", "RewardServer", "Sampler", "Sampler",
    ]  # fmt: skip
    assert all(others)
    assert len(calm.result["metrics"]) == ITERATIONS


def host_of(cluster: HostCluster, role: str, without: str = "") -> Host:
    """A host with a role of the run, and without another one if there is such a host."""
    hosts = [host for host in cluster.network.hosts if role in roles_on(host)]
    assert hosts
    return min(hosts, key=lambda host: without in roles_on(host))


@contextlib.contextmanager
def cut(host: Host) -> Iterator[None]:
    host.cut()
    try:
        yield
    finally:
        host.mend()


def rejoin(cluster: HostCluster, host: Host) -> None:
    """Start a node where one was lost, as its supervisor would."""
    until(lambda: not roles_on(host), f"workers of {host.name} outlive their node", NOTICED_S)
    cluster.join(host)


def lose_the_head(cluster: HostCluster) -> None:
    """The driver, too; the workers end by themselves. The rest of their nodes is then ended: Ray's
    agents go on for seconds without them, and hold the ports of those of new nodes, to which no job
    can be submitted then."""
    cluster.head.kill()
    for host in cluster.network.hosts:
        until(lambda host=host: not roles_on(host), f"workers of {host.name} go on", NOTICED_S)
    cluster.end()
    for host in cluster.network.hosts:
        host.kill()


def test_a_host_cut_off_and_back_then_the_head_lost(cluster: HostCluster, calm: CalmRun) -> None:
    """First for less than it takes to be missed, then for longer. What is left on the host ends
    when it is connected again, and does not meddle. The job is then submitted to a new cluster."""
    run = cluster.network.shared / "eventful"
    command = job(run, "--auto-resume")
    start(cluster, command)
    until(lambda: rows(run) >= 1, "the first iteration")
    with held(run):
        host = host_of(cluster, "Sampler", without="Learner")
        with cut(host):
            time.sleep(SHORT_S)
    until(lambda: rows(run) >= 2, "an iteration after a short cut")
    assert not in_log(run, "was lost")
    with held(run):
        with cut(host):
            gone = f"was lost (its machine {host.address} is gone)"
            until(lambda: in_log(run, gone), "the loss in the log", NOTICED_S)
            assert roles_on(host), "they went on without the others"
        rejoin(cluster, host)
    until(lambda: rows(run) >= 3, "an iteration with the host back")
    with held(run):
        assert rows(run) < ITERATIONS
        lose_the_head(cluster)
        cluster.start()
    again = cluster.submit(command)
    assert again.returncode == 0, again.stdout
    assert "resumed from step_" in again.stdout
    assert differences(calm.result, result(run)) == []


@pytest.mark.slow  # as a cut that lasts
@pytest.mark.parametrize("role", ["Sampler", "Learner"])
def test_a_host_without_power(cluster: HostCluster, calm: CalmRun, role: str) -> None:
    run = cluster.network.shared / f"killed-{role}"
    start(cluster, job(run))
    until(lambda: rows(run) >= 2, "two iterations")
    with held(run):
        host = host_of(cluster, role, without={"Sampler": "Learner", "Learner": "Sampler"}[role])
        host.kill()
        until(lambda: in_log(run, "was lost"), "the loss in the log", NOTICED_S)
        rejoin(cluster, host)
    until_finished(run)
    assert differences(calm.result, result(run)) == []


@pytest.mark.slow  # over a minute for the lock of a driver on another host
def test_the_head_is_lost_and_another_host_becomes_it(cluster: HostCluster, calm: CalmRun) -> None:
    run = cluster.network.shared / "another-head"
    command = job(run, "--auto-resume")
    start(cluster, command)
    until(lambda: rows(run) >= 3, "three iterations")
    with held(run):
        lose_the_head(cluster)
    try:
        with HostCluster(cluster.network, cpus=(2, 0, 2), head=1).start() as another:
            again = another.submit(command)
            assert again.returncode == 0, again.stdout
            assert "resumed from step_" in again.stdout
        assert differences(calm.result, result(run)) == []
    finally:
        cluster.start()
