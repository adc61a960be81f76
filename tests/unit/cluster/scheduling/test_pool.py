"""The life of workers, without Ray: handles are names."""

from __future__ import annotations

import pytest

from cluster.ray_backend.group_calls import Call, Stage
from cluster.roles import AutoscaleConfig, Resources, Role
from cluster.scheduling.in_flight import PendingBatch, PendingGroup
from cluster.scheduling.pool import State, Worker, WorkerPool
from cluster.spans import Span
from tests.unit.helpers import request


class Pool:
    """A pool whose workers start and stop on paper."""

    def __init__(self, count: int = 2, depth: int = 2, **options: object) -> None:
        role = Role(
            name="server",
            factory=object,
            config=None,
            resources=Resources(),
            count=count,
            depth=depth,
            **options,
        )
        self.started: list[str] = []
        self.stopped: list[str] = []
        self.pool = WorkerPool(role, self._launch, lambda worker: self.stopped.append(worker.name))
        self.serve()

    def _launch(self, role: Role, index: int, addition: bool, late: bool) -> Worker:
        self.alone = late
        worker = Worker(role, index, handle=f"{role.name}-{index}", addition=addition)
        self.started.append(worker.name)
        return worker

    def serve(self) -> None:
        for worker in self.pool.of(State.STARTING):
            worker.state = State.SERVING

    def names(self, state: State) -> list[str]:
        return [worker.name for worker in self.pool.of(state)]


def take(pool: WorkerPool) -> tuple[str, str] | None:
    picked = pool.next()
    if picked is None:
        return None
    (waiting,), worker = picked
    worker.take()
    return waiting.task, worker.name


def test_equals_get_the_work_in_turn_up_to_their_depth() -> None:
    made = Pool()
    for task in "abcde":
        made.pool.add(task)
    taken = [take(made.pool) for _ in range(5)]
    assert taken == [
        ("a", "server-0"),
        ("b", "server-1"),
        ("c", "server-0"),
        ("d", "server-1"),
        None,
    ]
    assert [waiting.task for waiting in made.pool.waiting] == ["e"]


def test_images_leave_room_for_tokens_unless_they_are_what_takes_longer() -> None:
    made = Pool(count=1, depth=2)
    (worker,) = made.pool.workers
    for task in "abc":
        made.pool.add(task)
    worker.decoding = 2
    assert take(made.pool) == ("a", "server")
    worker.decoding = 3
    assert take(made.pool) is None
    worker.decoding = 2
    assert take(made.pool) == ("b", "server")
    assert take(made.pool) is None


def test_one_that_leaves_finishes_its_images() -> None:
    made = Pool(count=2)
    leaving = made.pool.workers[1]
    leaving.decoding = 1
    made.pool.scale(1)
    assert made.names(State.DRAINING) == ["server-1"]
    leaving.decoding = 0
    assert made.pool.dismiss() == [leaving]


def test_work_that_overlaps_counts_once() -> None:
    worker = Pool(count=1).pool.workers[0]
    spans = [(100, 104), (104, 108), (104, 106), (103, 109), (120, 121)]
    counted = [worker.count_work(Span("w", "work", start, end)) for start, end in spans]
    assert counted == [4, 4, 0, 1, 1]


def test_work_that_was_begun_goes_first() -> None:
    made = Pool()
    made.pool.add("new")
    made.pool.add("again", front=True)
    assert take(made.pool) == ("again", "server-0")


def test_new_workers_get_nothing_before_they_serve() -> None:
    made = Pool(count=1, depth=1)
    made.pool.scale(3)
    assert made.names(State.STARTING) == ["server-1", "server-2"]
    assert made.pool.target == 3
    for task in "ab":
        made.pool.add(task)
    assert take(made.pool) == ("a", "server")
    assert take(made.pool) is None
    made.serve()
    assert take(made.pool) == ("b", "server-1")


def test_those_that_leave_finish_first() -> None:
    made = Pool(count=3)
    for task in "abc":
        made.pool.add(task)
        take(made.pool)
    made.pool.scale(1)
    assert made.names(State.SERVING) == ["server-0"]
    assert made.names(State.DRAINING) == ["server-1", "server-2"]
    assert made.stopped == []
    made.pool.add("d")
    assert take(made.pool) == ("d", "server-0")  # nothing new for those that leave
    made.pool.workers[2].give()
    assert [worker.name for worker in made.pool.dismiss()] == ["server-2"]
    assert made.stopped == ["server-2"]
    assert made.names(State.DRAINING) == ["server-1"]


def test_the_idle_leave_at_once_and_the_starting_go_first() -> None:
    made = Pool(count=2)
    made.pool.scale(4)
    made.pool.scale(1)
    assert sorted(made.stopped) == ["server-1", "server-2", "server-3"]
    assert [worker.name for worker in made.pool.workers] == ["server-0"]


def test_who_was_to_leave_stays_when_more_are_wanted() -> None:
    made = Pool(count=2)
    made.pool.workers[1].busy = 1
    made.pool.scale(1)
    made.pool.scale(3)
    assert made.names(State.SERVING) == ["server-0", "server-1"]
    assert made.names(State.STARTING) == ["server-2"]
    assert made.stopped == []


def test_numbers_that_became_free_are_used_again() -> None:
    made = Pool(count=3)
    made.pool.drop(made.pool.workers[1])
    made.pool.scale(4)
    assert made.started == ["server-0", "server-1", "server-2", "server-1", "server-3"]


def test_a_lost_worker_is_replaced_once() -> None:
    made = Pool(count=2)
    lost = made.pool.workers[0]
    new = made.pool.replace(lost)
    assert new is not None
    assert (new.index, new.state) == (0, State.STARTING)
    assert made.pool.replace(lost) is None  # another call of the same worker failed, too
    assert len(made.pool.workers) == 2


def test_a_lost_worker_that_was_to_leave_is_gone() -> None:
    made = Pool(count=2)
    made.pool.workers[1].busy = 1
    made.pool.scale(1)
    assert made.pool.replace(made.pool.workers[1]) is None
    assert [worker.name for worker in made.pool.workers] == ["server-0"]


@pytest.mark.parametrize(
    ("count", "most", "names"),
    [(1, 0, ["server"]), (2, 0, ["server-0", "server-1"]), (1, 3, ["server-0"])],
)
def test_names(count: int, most: int, names: list[str]) -> None:
    made = Pool(count=count, autoscale=AutoscaleConfig(max=most))
    assert made.started == names


def test_the_only_worker_of_a_role_does_not_wait_for_room() -> None:
    made = Pool(count=3)
    for index, alone in enumerate([False, False, True]):
        made.pool.replace(made.pool.workers[index])
        assert made.alone == alone


def test_a_worker_tells_what_it_has_had_longest() -> None:
    """Of a real call; what an error says of a worker that does not answer."""
    worker = Pool().pool.workers[0]
    group = PendingGroup(PendingBatch([None]), 0, request(group=3, iteration=5), ("server",))
    assert worker.at(0.0) == ""
    first = Call((group,), Pool().pool, worker, Stage.SCORE)
    second = Call((group, group), Pool().pool, worker, Stage.SAMPLE)
    for call in (first, second):
        call.began()
    now = worker.calls[id(first)][1]
    assert worker.at(now + 600) == "the scores of group 3 of train 5 for 600 s"
    first.ended()
    assert worker.at(now).startswith("the tokens of group 3 of train 5 and 1 more for ")
    second.ended()
    assert worker.at(now) == ""
