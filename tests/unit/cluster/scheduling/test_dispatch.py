"""Who is given work, and how much: by hand, and against the best that could be done."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.roles import Resources, Role
from cluster.scheduling import dispatch
from cluster.scheduling.dispatch import Candidate, Pace, batch_size, free_in, paces
from cluster.scheduling.pool import State, Worker, WorkerPool
from cluster.scheduling.work_queue import Waiting, WorkQueue


def candidate(
    pace: float | None,
    tasks: int = 0,
    elapsed: float = 0.0,
    weight_version: int = 0,
    room: bool = True,
) -> Candidate:
    return Candidate(pace, tasks, float(bool(tasks)), elapsed, weight_version, room)


def choose(versions: list[int], workers: list[Candidate]) -> tuple[int, int] | None:
    """`dispatch.choose`, of the weight versions of single tasks."""
    runs = [(version, len([*same])) for version, same in groupby(versions)]
    return dispatch.choose(runs, workers)


def test_pace_is_work_over_pieces_and_forgets() -> None:
    pace = Pace()
    pace.add(30.0, 1)  # it warms up
    assert pace.value is None
    pace.add(3.0, 1)
    assert pace.value == 3.0
    pace.add(1.0, 0)  # images that nothing else overlapped with
    assert pace.value == 4.0
    pace.add(2.0, 2)  # a batch
    assert pace.value == pytest.approx((0.81 * 4 + 2) / (0.81 + 2))
    for _ in range(100):
        pace.add(1.0, 1)
    assert pace.value == pytest.approx(1.0, abs=1e-3)
    instant = Pace()
    for _ in range(3):
        instant.add(0.0, 1)
    assert instant.value is None


def test_who_is_not_known_counts_as_the_mean() -> None:
    assert paces([candidate(2.0), candidate(None), candidate(4.0)]) == [2.0, 3.0, 4.0]
    assert paces([candidate(None)]) == [1.0]


def test_when_a_worker_is_free() -> None:
    assert free_in(candidate(2.0), 2.0) == 0
    assert free_in(candidate(2.0, tasks=2, elapsed=0.5), 2.0) == 3.5
    assert free_in(candidate(2.0, tasks=1, elapsed=7.0), 2.0) == 5.0  # five late: five more
    assert free_in(candidate(None, tasks=2, elapsed=7.0), 3.0) == 6.0
    # two calls of four tasks each, the first half done
    assert free_in(Candidate(1.0, 8, 4.0, 2.0, 0, True), 1.0) == 6.0


def test_work_waits_for_the_worker_that_would_finish_first() -> None:
    fast, slow = candidate(1.0, tasks=2, room=False), candidate(4.6)
    # further tasks of the fast one end at 3, 4 and 5, the slow one's at 4.6
    assert choose([0], [fast, slow]) is None
    assert choose([0, 0], [fast, slow]) is None
    assert choose([0, 0, 0], [fast, slow]) == (2, 1)
    assert choose([0], [fast, candidate(3.4)]) == (0, 1)  # half a task is no difference
    assert choose([0], [fast, candidate(3.6)]) is None
    assert choose([0] * 9, [fast, candidate(1.0, tasks=2, room=False)]) is None
    assert choose([], [slow]) is None


def test_those_that_are_about_as_fast_take_turns() -> None:
    """A dead one that looked a little slower would otherwise never be found out."""
    one, two = candidate(1.0, elapsed=3.0), candidate(1.4, elapsed=9.0)
    assert choose([0], [one, two]) == (0, 1)
    two.elapsed = 2.0
    assert choose([0], [one, two]) == (0, 0)
    two.pace = 1.6
    two.elapsed = 9.0
    assert choose([0], [one, two]) == (0, 0)


def test_work_of_older_weights_goes_to_who_still_can() -> None:
    ahead, slow = candidate(1.0, weight_version=2), candidate(4.0, weight_version=1)
    assert choose([1, 2], [ahead, slow]) == (0, 1)
    slow.has_room = False
    assert choose([1, 2], [ahead, slow]) == (1, 0)
    assert choose([1], [ahead, slow]) is None


@pytest.mark.parametrize(
    ("most", "waiting", "speeds", "hands", "chosen", "size"),
    [
        (4, 40, [1, 1, 1, 1], [0, 0, 0, 0], 0, 4),
        (1, 40, [1, 1], [0, 0], 0, 1),
        (8, 8, [1, 1, 1, 1], [0, 0, 0, 0], 0, 2),  # 8 tasks over 4 workers
        (8, 6, [1, 1, 1, 1], [2, 0, 0, 0], 1, 2),  # and the next worker's share of them
        (8, 8, [4, 4, 4, 1], [0, 0, 0, 0], 3, 1),  # a thirteenth of 8
        (8, 40, [4, 4, 4, 1], [0, 0, 0, 0], 3, 2),  # 3.08: a power of two
        (8, 40, [4, 4, 4, 1], [0, 0, 0, 0], 0, 8),
        (8, 4, [1, 1], [4, 4], 0, 2),
        (8, 5, [1, 1], [4, 0], 0, 1),  # the other has less in hand
        (8, 3, [1], [0], 0, 2),
        (8, 1, [1, 1], [4, 4], 0, 1),
        (8, 1, [1, 1], [4, 0], 0, 1),
    ],
)
def test_batches_by_hand(
    most: int, waiting: int, speeds: list[int], hands: list[int], chosen: int, size: int
) -> None:
    workers = [candidate(1 / speed, hand) for speed, hand in zip(speeds, hands)]
    assert batch_size(most, waiting, workers, chosen) == size


Pick = Callable[[WorkerPool, float], tuple[list[Waiting], Worker] | None]


def made(seconds: list[float], max_groups: int = 1, max_rows: int = 0) -> WorkerPool:
    role = Role(
        name="sampler",
        factory=object,
        config=None,
        resources=Resources(),
        count=len(seconds),
        max_groups=max_groups,
        max_rows=max_rows,
    )
    pool = WorkerPool(role, lambda r, i, *_: Worker(r, i, handle=None), lambda worker: None)
    for worker in pool.workers:
        worker.state = State.SERVING
    return pool


def makespan(pool: WorkerPool, seconds: list[float], count: int, start: float, pick: Pick) -> float:
    """Seconds until `count` tasks are done by workers that answer in order, one call after
    another; sizes of the calls are recorded in the pool's `sizes`."""
    for number in range(count):
        pool.add(number)
    free = dict.fromkeys(pool.workers, start)
    ends: list[tuple[float, int, int]] = []
    now, done = start, 0
    while done < count:
        while picked := pick(pool, now):
            tasks, worker = picked
            worker.take(len(tasks), now)
            free[worker] = max(free[worker], now) + seconds[worker.index] * len(tasks)
            heapq.heappush(ends, (free[worker], worker.index, len(tasks)))
        now, index, size = heapq.heappop(ends)
        worker = pool.workers[index]
        worker.give(size, now)
        worker.pace.add(seconds[index] * size, size)
        done += size
    return now - start


def by_speed(pool: WorkerPool, now: float) -> tuple[list[Waiting], Worker] | None:
    return pool.next(now)


def least_busy(pool: WorkerPool, now: float) -> tuple[list[Waiting], Worker] | None:
    able = [worker for worker in pool.workers if worker.has_room]
    if not (pool.waiting and able):
        return None
    return pool.waiting.take(0, 1), min(able, key=lambda worker: (worker.busy, worker.index))


def best_makespan(seconds: list[float], count: int) -> float:
    """Of identical tasks: each in turn to the worker that ends it first is optimal."""
    ends = [0.0] * len(seconds)
    for _ in range(count):
        index = min(range(len(seconds)), key=lambda i: ends[i] + seconds[i])
        ends[index] += seconds[index]
    return max(ends)


@pytest.mark.parametrize("slow", [0, 3])
def test_a_slow_sampler_does_not_hold_up_an_iteration(slow: int) -> None:
    """One of four is four times slower; nothing is known of them before the first iteration."""
    seconds = [1.0] * 4
    seconds[slow] = 4.0
    best = best_makespan(seconds, 40)
    assert best == 13.0
    pool, other = made(seconds), made(seconds)
    for iteration in range(5):
        took = makespan(pool, seconds, 40, 1000.0 * iteration, by_speed)
        assert took <= 1.1 * best
        assert makespan(other, seconds, 40, 1000.0 * iteration, least_busy) > 1.1 * best


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_random_speeds_come_close_to_the_best(count: int) -> None:
    seconds = [1.0, 1.3, 2.2, 3.1, 0.7]
    pool = made(seconds)
    makespan(pool, seconds, 40, 0.0, by_speed)  # gets to know them
    took = makespan(pool, seconds, count, 1000.0, by_speed)
    # what is in hand cannot be taken back, and half a task is no difference
    assert took <= best_makespan(seconds, count) + 0.7


def test_batches_leave_nobody_without_work_at_the_end() -> None:
    seconds = [1.0, 1.0, 1.0, 4.0]
    pool = made(seconds, max_groups=8)
    sizes: list[int] = []

    def pick(pool: WorkerPool, now: float) -> tuple[list[Waiting], Worker] | None:
        picked = pool.next(now)
        if picked:
            sizes.append(len(picked[0]))
        return picked

    makespan(pool, seconds, 40, 0.0, pick)
    sizes.clear()
    took = makespan(pool, seconds, 64, 1000.0, pick)
    assert sum(sizes) == 64
    assert max(sizes) == 8
    assert took <= 1.1 * best_makespan(seconds, 64)


def test_a_call_holds_no_more_rows_than_planned() -> None:
    pool = made([1.0], max_groups=8, max_rows=40)
    for kind, rows in ((1, 5), (2, 10), (3, 50)):
        for task in range(8):
            pool.add(task, kind=kind, rows=rows)
    calls = []
    while found := pool.next(0.0):
        calls.append((found[0][0].rows, len(found[0])))
    assert calls == [(5, 8), (10, 4), (10, 4), *[(50, 1)] * 8]


def test_only_alike_pieces_go_together() -> None:
    pool = made([1.0], max_groups=8)
    for task, kind, weight_version in [
        ("a", 1, 1),
        ("b", 1, 1),
        ("c", 2, 1),
        ("d", 2, 1),
        ("e", 2, 2),
    ]:
        pool.add(task, kind=kind, weight_version=weight_version)
    taken = []
    while picked := pool.next(0.0):
        taken.append([waiting.task for waiting in picked[0]])
    assert taken == [["a", "b"], ["c", "d"], ["e"]]


operations = st.lists(
    st.tuples(st.sampled_from(["add", "first", "take", "remove"]), st.integers(0, 9)), max_size=60
)


@settings(deadline=None)
@given(operations)
def test_a_queue_is_a_list_in_order_of_editions(operations: list[tuple[str, int]]) -> None:
    queue, model, newest = WorkQueue(), list[Waiting](), 0
    for number, (what, value) in enumerate(operations):
        if what == "add":
            newest += value == 9
            waiting = Waiting(number, newest, value % 2)
            queue.add(waiting)
            model.append(waiting)
        elif what == "first":
            waiting = Waiting(number, min(value, newest), value % 2)
            queue.add_first(waiting)
            older = sum(each.weight_version < waiting.weight_version for each in model)
            model.insert(older, waiting)
        elif what == "remove":
            queue.remove(lambda task, value=value: task % 10 == value)
            model = [each for each in model if each.task % 10 != value]
        elif value < len(model):
            same = 1
            while value + same < len(model) and model[value].goes_with(model[value + same]):
                same += 1
            assert queue.alike(value) == same
            assert queue.at(value).weight_version == model[value].weight_version
            count = (same + 1) // 2
            assert queue.take(value, count) == model[value : value + count]
            del model[value : value + count]
        assert [*queue] == model
        assert len(queue) == len(model) == sum(count for _, count in queue.batches())
        assert [e for e, count in queue.batches() for _ in range(count)] == [
            w.weight_version for w in model
        ]
