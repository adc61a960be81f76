"""Which weights are kept, and which worker may be given older work. No Ray."""

from __future__ import annotations

from cluster.scheduling.pool import State
from cluster.scheduling.weight_versions import Editions
from tests.unit.cluster.scheduling.test_pool import Pool, take


def test_older_weights_are_kept_while_somebody_needs_them() -> None:
    editions = Editions()
    assert editions.oldest([]) == editions.newest == 0
    assert [editions.publish(name) for name in "abc"] == [1, 2, 3]
    assert editions.oldest([3, 2, 2]) == 2
    assert (len(editions), editions[2], editions[3]) == (2, "b", "c")
    assert editions.oldest([]) == 3  # nobody waits: the newest alone
    assert len(editions) == 1


def test_a_worker_with_newer_weights_gets_no_older_work() -> None:
    made = Pool()
    made.pool.workers[0].edition = 2
    made.pool.add("old", edition=1)
    made.pool.add("new", edition=2)
    assert take(made.pool) == ("old", "server-1")
    made.pool.workers[1].edition = 2
    assert take(made.pool) == ("new", "server-0")


def test_work_of_a_lost_worker_goes_to_the_front_of_its_edition() -> None:
    made = Pool()
    for task, edition in (("c", 2), ("d", 3)):
        made.pool.add(task, edition=edition)
    made.pool.add("b2", front=True, edition=2)
    made.pool.add("a1", front=True, edition=1)
    made.pool.add("z9", front=True, edition=9)
    assert [waiting.task for waiting in made.pool.waiting] == ["a1", "b2", "c", "d", "z9"]


def test_who_went_on_is_turned_back_only_when_nobody_else_can() -> None:
    made = Pool()
    one, two = made.pool.workers
    one.edition = two.edition = 2
    assert made.pool.turn_back() is None  # nothing waits
    made.pool.add("old", edition=1)
    one.busy = two.busy = 1
    assert made.pool.turn_back() is None  # all are busy
    two.busy = 0
    new = made.pool.turn_back()
    assert new is not None
    assert (new.name, new.state, made.stopped) == ("server-1", State.STARTING, ["server-1"])
    assert made.pool.turn_back() is None  # it is coming, with edition 0
    made.serve()
    assert take(made.pool) == ("old", "server-1")
