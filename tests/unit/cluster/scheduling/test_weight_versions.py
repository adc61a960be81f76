"""Which weights are kept, and which worker may be given older work. No Ray."""

from __future__ import annotations

import pytest

from cluster.errors import FleetError
from cluster.scheduling.pool import State
from cluster.scheduling.weight_versions import NO_WEIGHTS, WeightVersions
from tests.unit.cluster.scheduling.test_pool import Pool, take


def test_older_weights_are_kept_while_somebody_needs_them() -> None:
    weight_versions = WeightVersions()
    assert weight_versions.oldest([]) == weight_versions.newest == NO_WEIGHTS
    for version, name in enumerate("abc", 1):
        weight_versions.publish(version, name)
    with pytest.raises(FleetError, match="version 3 follow those of version 3"):
        weight_versions.publish(3, "again")
    assert weight_versions.oldest([3, 2, 2]) == 2
    assert (len(weight_versions), weight_versions[2], weight_versions[3]) == (2, "b", "c")
    assert weight_versions.oldest([]) == 3  # nobody waits: the newest alone
    assert len(weight_versions) == 1


def test_a_worker_with_newer_weights_gets_no_older_work() -> None:
    made = Pool()
    made.pool.workers[0].weight_version = 2
    made.pool.add("old", weight_version=1)
    made.pool.add("new", weight_version=2)
    assert take(made.pool) == ("old", "server-1")
    made.pool.workers[1].weight_version = 2
    assert take(made.pool) == ("new", "server-0")


def test_work_of_a_lost_worker_goes_to_the_front_of_its_edition() -> None:
    made = Pool()
    for task, weight_version in (("c", 2), ("d", 3)):
        made.pool.add(task, weight_version=weight_version)
    made.pool.add("b2", front=True, weight_version=2)
    made.pool.add("a1", front=True, weight_version=1)
    made.pool.add("z9", front=True, weight_version=9)
    assert [waiting.task for waiting in made.pool.waiting] == ["a1", "b2", "c", "d", "z9"]


def test_who_went_on_is_turned_back_only_when_nobody_else_can() -> None:
    made = Pool()
    one, two = made.pool.workers
    one.weight_version = two.weight_version = 2
    assert made.pool.recycle() is None  # nothing waits
    made.pool.add("old", weight_version=1)
    one.busy = two.busy = 1
    assert made.pool.recycle() is None  # all are busy
    two.busy = 0
    new = made.pool.recycle()
    assert new is not None
    assert (new.name, new.state, made.stopped) == ("server-1", State.STARTING, ["server-1"])
    assert made.pool.recycle() is None  # it is coming, with weight_version 0
    made.serve()
    assert take(made.pool) == ("old", "server-1")
