"""An iteration from its pieces: by hand, and never longer with faster pieces."""

from __future__ import annotations

import dataclasses
import random

import pytest

from learner.capacity.scale.iteration import CROWDED, DEPENDENCY, Setting, predict
from learner.capacity.scale.links import Host, Messages, store_bytes, traffic
from learner.capacity.service_times import ServiceTimes

FREE = ServiceTimes(
    sample=0, images=0, score={"reward-server": 0}, commit=0, learn=0, publish=0, load=0, record=0,
    driver=0, image_bytes=100, rollout_bytes=12, snapshot_bytes=1000,
)  # fmt: skip
ONE = [Host(samplers=1, servers={"reward-server": 1}, learners=1)]


def of(**changes: object) -> ServiceTimes:
    return dataclasses.replace(FREE, **changes)  # type: ignore[arg-type]


def setting(groups: int = 4, calls: tuple[int, ...] = (1, 1, 1, 1), **changes: object) -> Setting:
    return Setting(**{"groups": groups, "calls": calls, "staleness": 0, "hosts": ONE, **changes})  # type: ignore[arg-type]


def test_pieces_that_follow_each_other_overlap_group_by_group() -> None:
    times = of(sample=3.0, images=1.0, score={"reward-server": 2.0}, learn=10.0, commit=0.5)
    found = predict(times, setting())
    assert found.sampling == pytest.approx(4 * (3 + 1) + 2, abs=0.02)  # the last one's scores
    assert found.learning == pytest.approx(10.5, abs=0.02)
    assert found.seconds == pytest.approx(found.sampling + found.learning)
    threads = {"sampler": 1, "reward-server": 1, "learner": 1}
    beside = predict(times, setting(threads=threads, cores=8))
    assert beside.sampling == pytest.approx(4 * 3 + 1 + 2, abs=0.02)  # images have a thread
    slow = predict(of(sample=1.0, score={"reward-server": 5.0}), setting())
    assert slow.sampling == pytest.approx(1 + 4 * 5, abs=0.02)
    assert slow.bottleneck == "reward-server"


def test_staleness_overlaps_iterations_until_a_resource_is_full() -> None:
    times = of(sample=2.0, learn=6.0)
    by_staleness = [predict(times, setting(staleness=s)) for s in range(4)]
    assert [p.seconds for p in by_staleness] == pytest.approx([14, 8, 8, 8], abs=0.02)
    assert by_staleness[0].bottleneck == by_staleness[1].bottleneck == "sampler"
    balanced = predict(of(sample=2.0, learn=8.0, publish=4.0, load=4.0), setting(staleness=1))
    assert (balanced.bottleneck, balanced.seconds) == (DEPENDENCY, pytest.approx(12, abs=0.02))


def test_the_driver_bounds_many_workers() -> None:
    many = [Host(samplers=1000, servers={"reward-server": 1000}, learners=1)]
    found = predict(of(sample=1.0, driver=0.002), setting(1000, (1,), hosts=many, staleness=1))
    assert (found.bottleneck, found.seconds) == ("driver", pytest.approx(2.0))


def test_samplers_share_cores() -> None:
    threads = {"sampler": 1, "reward-server": 1, "learner": 2}
    times = of(sample=1.0, images=0.25, score={"reward-server": 0.25})

    def crowd(count: int, cores: int) -> float:  # threads that sample and score
        return 1 + CROWDED * (1 - cores / count)

    for samplers, calls, without_loss in ((1, 8, 8.5), (2, 4, 6.4), (4, 2, 6.5), (8, 1, 6.9)):
        host = [Host(samplers=samplers, servers={"reward-server": 1}, learners=1)]
        found = predict(times, setting(8, (1,) * calls, hosts=host, cores=2, threads=threads))
        expected = without_loss * crowd(samplers + 1, 2)
        assert found.sampling == pytest.approx(expected, rel=0.13)
    apart = [Host(samplers=1, servers={"reward-server": 1}, learners=1), Host(samplers=1)]
    found = predict(times, setting(8, (1,) * 4, hosts=apart, cores=1, threads=threads))
    assert found.sampling == pytest.approx((4 * 1.25 + 8 * 0.25) * crowd(2, 1), rel=0.1)


def random_times(rng: random.Random) -> ServiceTimes:
    names = ("sample", "images", "commit", "learn", "publish", "load", "record", "driver")
    numbers = {name: rng.uniform(0, 2) for name in names}
    return of(**numbers, score={"reward-server": rng.uniform(0, 2)})


def random_setting(rng: random.Random, link: float) -> Setting:
    hosts = [
        Host(
            samplers=rng.randint(1, 3),
            servers={"reward-server": rng.randint(1, 2)},
            learners=rng.randint(0, 1),
        )
        for _ in range(rng.randint(1, 3))
    ]
    groups = rng.randint(1, 40)
    calls = [1] * -(-groups // sum(host.samplers for host in hosts))
    on_cpus: dict[str, object] = {}
    if rng.random() < 0.5:
        threads = {"sampler": 1, "reward-server": 1, "learner": 2}
        on_cpus = {"cores": rng.choice([1, 2, 8]), "threads": threads}
    return setting(
        groups,
        tuple(calls),
        hosts=hosts,
        link=link,
        staleness=rng.randint(0, 2),
        traffic=traffic(hosts, Messages.of(FREE, groups, 10)),
        paired=rng.random() < 0.3,
        **on_cpus,
    )


def test_faster_pieces_and_links_never_make_it_slower() -> None:
    rng = random.Random(7)
    for _ in range(300):
        times, slow = random_times(rng), random_setting(rng, link=rng.uniform(100, 1e5))
        now = predict(times, slow).seconds
        assert predict(times, dataclasses.replace(slow, link=slow.link * 2)).seconds <= now + 1e-9
        assert predict(times, dataclasses.replace(slow, staleness=slow.staleness + 1)).seconds <= (
            now + 1e-9
        )
        for name in ("sample", "images", "commit", "learn", "publish", "load", "record", "driver"):
            faster = dataclasses.replace(times, **{name: getattr(times, name) * rng.random()})
            assert predict(faster, slow).seconds <= now + 1e-9
        faster = dataclasses.replace(times, score={"reward-server": 0.0})
        assert predict(faster, slow).seconds <= now + 1e-9
        if slow.threads:
            more = dataclasses.replace(slow, cores=slow.cores * 2)
            assert predict(times, more).seconds <= now + 1e-9


def test_bytes_by_hand() -> None:
    """Two hosts: learner, driver and two samplers; two samplers and all reward servers."""
    hosts = [
        Host(samplers=2, learners=1),
        Host(samplers=2, servers={"reward-server": 2, "reward-extra": 1}),
    ]
    messages = Messages(groups=8, images=100, rollouts=12, scores=40, snapshot=1000)
    found = traffic(hosts, messages)
    assert found["images"].sent == found["images"].total == 4 * 100  # once for both pools
    assert found["weights"].busiest == found["weights"].total == 1000  # once a host
    assert found["rollouts"].received == 4 * 12 + 8 * 40
    assert found["rollouts"].sent == 4 * 12  # back to the samplers, for their images
    assert found["gradients"].total == 0
    everywhere = traffic([Host(samplers=4, servers={"reward-server": 1}, learners=1)], messages)
    assert all(each.total == 0 for each in everywhere.values())
    assert store_bytes(hosts, messages, 0) == 8 * 100 + 3 * 1000
    assert store_bytes(hosts, messages, 1) == 2 * 8 * 100 + 3 * 1000


def test_each_copy_is_counted_once() -> None:
    """Against every pair of hosts, one by one."""
    rng = random.Random(3)
    for _ in range(50):
        hosts = random_setting(rng, 1.0).hosts
        messages = Messages(groups=8, images=100, rollouts=12, scores=40, snapshot=1000)
        samplers = sum(host.samplers for host in hosts)
        servers = sum(host.servers["reward-server"] for host in hosts)
        pairs = {
            (a, b): 8 * one.samplers / samplers * two.servers["reward-server"] / servers * 100
            for a, one in enumerate(hosts)
            for b, two in enumerate(hosts)
            if a != b
        }
        found = traffic(hosts, messages)["images"]
        assert found.total == pytest.approx(sum(pairs.values()))
        places = range(len(hosts))
        sent = (sum(v for (a, _), v in pairs.items() if a == at) for at in places)
        received = (sum(v for (_, b), v in pairs.items() if b == at) for at in places)
        assert found.sent == pytest.approx(max(sent))
        assert found.received == pytest.approx(max(received))
