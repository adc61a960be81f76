from __future__ import annotations

import ctypes
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from cluster.errors import FleetError, StuckError
from rewards.config import BatchingConfig
from rewards.servers.batcher import Batcher


class Recorder:
    """Squares numbers, remembers the batches, and can be held up."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.groups: list[object] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def __call__(self, items: list[int], group: object) -> list[int]:
        self.batches.append(items)
        self.groups.append(group)
        self.entered.release()
        assert self.gate.wait(10)
        if any(item < 0 for item in items):
            raise ValueError(f"negative: {items}")
        return [item**2 for item in items]


def make(work: Recorder, **options: object) -> Batcher[int, int]:
    defaults = {"max_batch": 8, "max_wait_s": 0.0, "max_queued": 64, "queue_timeout_s": 10.0}
    return Batcher(work, **{**defaults, **options})


def held(work: Recorder, batcher: Batcher[int, int], pool: ThreadPoolExecutor) -> Future:
    """Occupy the working thread, so that what comes next queues up."""
    work.gate.clear()
    first = pool.submit(batcher.submit, 0, 1)
    assert work.entered.acquire(timeout=10)
    return first


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def enqueue(
    batcher: Batcher[int, int], pool: ThreadPoolExecutor, items: list[tuple[int, int, object]]
) -> list[Future]:
    """Submit in order: each is in the queue before the next one comes."""
    futures = []
    for item, size, group in items:
        before = batcher.stats().queued_images
        futures.append(pool.submit(batcher.submit, item, size, group))
        wait_for(lambda before=before, size=size: batcher.stats().queued_images == before + size)
    return futures


def test_what_has_come_together_is_worked_on_together_up_to_the_size() -> None:
    work = Recorder()
    batcher = make(work)
    with ThreadPoolExecutor(8) as pool:
        held(work, batcher, pool)
        futures = enqueue(batcher, pool, [(n, 3, None) for n in (1, 2, 3, 4)])
        work.gate.set()
        assert [future.result(10)[0] for future in futures] == [1, 4, 9, 16]
    assert work.batches == [[0], [1, 2], [3, 4]]  # 3 + 3 fit into 8, 3 + 3 + 3 do not
    firsts = [future.result()[1].first for future in futures]
    assert firsts == [True, False, True, False]


def test_a_lone_request_waits_for_others_as_long_as_configured() -> None:
    work = Recorder()
    batcher = make(work, max_wait_s=1.0)
    with ThreadPoolExecutor(2) as pool:
        start = time.monotonic()
        first = pool.submit(batcher.submit, 1, 1)
        time.sleep(0.05)
        second = pool.submit(batcher.submit, 2, 1)
        first.result(10), second.result(10)
        assert 1.0 <= time.monotonic() - start < 10
    assert work.batches == [[1, 2]]


def test_a_full_batch_does_not_wait() -> None:
    batcher = make(Recorder(), max_wait_s=30.0)
    start = time.monotonic()
    assert batcher.submit(3, 8)[0] == 9
    assert time.monotonic() - start < 5


def test_size_zero_takes_every_request_by_itself_at_once() -> None:
    work = Recorder()
    batcher = make(work, max_batch=0, max_wait_s=30.0)
    with ThreadPoolExecutor(4) as pool:
        held(work, batcher, pool)
        futures = enqueue(batcher, pool, [(1, 1, None), (2, 1, None)])
        work.gate.set()
        assert [future.result(10)[0] for future in futures] == [1, 4]
    assert work.batches == [[0], [1], [2]]


def test_only_one_kind_at_a_time_and_nobody_is_passed_over() -> None:
    work = Recorder()
    batcher = make(work)
    with ThreadPoolExecutor(8) as pool:
        held(work, batcher, pool)
        asked = [(1, 1, "a"), (2, 1, "b"), (3, 1, "a"), (4, 1, "b")]
        futures = enqueue(batcher, pool, asked)
        work.gate.set()
        assert [future.result(10)[0] for future in futures] == [1, 4, 9, 16]
    assert work.batches[1:] == [[1, 3], [2, 4]]
    assert work.groups[1:] == ["a", "b"]


def test_an_error_is_the_answer_of_the_request_that_caused_it() -> None:
    work = Recorder()
    batcher = make(work)
    with ThreadPoolExecutor(8) as pool:
        held(work, batcher, pool)
        futures = enqueue(batcher, pool, [(2, 1, None), (-1, 1, None), (3, 1, None)])
        work.gate.set()
        assert futures[0].result(10)[0] == 4
        assert futures[2].result(10)[0] == 9
        with pytest.raises(ValueError, match=r"negative: \[-1\]"):
            futures[1].result(10)
    assert batcher.submit(5, 1)[0] == 25  # it lives


def test_a_full_queue_holds_callers_up_until_there_is_room() -> None:
    work = Recorder()
    batcher = make(work, max_queued=4)
    with ThreadPoolExecutor(8) as pool:
        held(work, batcher, pool)
        enqueue(batcher, pool, [(1, 2, None), (2, 2, None)])
        late = pool.submit(batcher.submit, 3, 2)
        time.sleep(0.1)
        assert batcher.stats().queued_images == 4  # the third is not let in
        assert not late.done()
        work.gate.set()
        assert late.result(10)[0] == 9


def test_a_queue_that_stays_full_is_an_error_that_says_what_to_do() -> None:
    work = Recorder()
    batcher = make(work, max_queued=2, queue_timeout_s=0.05)
    with ThreadPoolExecutor(8) as pool:
        first = held(work, batcher, pool)
        waiting = enqueue(batcher, pool, [(1, 2, None)])
        with pytest.raises(FleetError, match=r"2 images wait already \(max_queued 2\).*start more"):
            batcher.submit(2, 1)
        work.gate.set()
        assert [future.result(10)[0] for future in (first, *waiting)] == [0, 1]


def test_more_than_the_queue_ever_holds_goes_alone() -> None:
    assert make(Recorder(), max_queued=2).submit(4, 100)[0] == 16


def test_statistics() -> None:
    work = Recorder()
    batcher = make(work)
    with ThreadPoolExecutor(4) as pool:
        held(work, batcher, pool)
        futures = enqueue(batcher, pool, [(1, 2, None), (2, 3, None)])
        time.sleep(0.1)
        work.gate.set()
        times = [future.result(10)[1] for future in futures]
    wait_for(lambda: batcher.stats().requests == 3)
    stats = batcher.stats()
    assert (stats.requests, stats.images, stats.batches) == (3, 6, 2)
    assert stats.queued_images == 0
    assert stats.busy_s >= 0.1
    assert 0.05 < stats.wait_mean_s < 5
    assert all(work.arrived + 0.09 <= work.start <= work.end for work in times)


def test_closing_fails_what_waits_and_refuses_more() -> None:
    work = Recorder()
    batcher = make(work)
    with ThreadPoolExecutor(8) as pool:
        first = held(work, batcher, pool)
        waiting = enqueue(batcher, pool, [(1, 1, None)])
        closing = pool.submit(batcher.close)
        work.gate.set()
        closing.result(10)
        assert first.result(10)[0] == 0
        with pytest.raises(FleetError, match="was closed"):
            waiting[0].result(10)
    with pytest.raises(FleetError, match="is closed"):
        batcher.submit(1, 1)


@pytest.mark.parametrize(
    ("field", "value"), [("max_batch", -1), ("max_wait_ms", -1.0), ("max_queued", 0)]
)
def test_configuration_validates(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} must be >="):
        BatchingConfig(**{field: value})


@pytest.mark.parametrize("ending", [SystemExit(0), KeyboardInterrupt(), GeneratorExit()])
def test_work_that_ends_threads_is_an_error_of_its_request(ending: BaseException) -> None:
    def work(items: list[int], group: object) -> list[int]:
        if -1 in items:
            raise ending
        return items

    batcher = make(work)  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(FleetError, match=f"batcher: {type(ending).__name__}.*test_batcher.py"):
            batcher.submit(-1, 1)
        assert batcher.submit(5, 1)[0] == 5


class Sick(Batcher[int, int]):
    """Its loop, not the work, goes wrong once."""

    fault: BaseException = MemoryError("none left")

    def _do(self, batch: list) -> None:
        raise self.fault


@pytest.mark.parametrize("fault", [MemoryError("none left"), SystemExit(1)])
def test_a_thread_that_ends_fails_what_waits_and_refuses_what_comes(fault: BaseException) -> None:
    work = Recorder()
    batcher = Sick(work, max_batch=0, max_wait_s=0.0, max_queued=2, queue_timeout_s=30.0)
    batcher.fault = fault
    told = f"batcher cannot work any more: {type(fault).__name__}"
    for _ in range(2):
        with pytest.raises(FleetError, match=told):
            batcher.submit(1, 1)
    assert batcher.stats().queued_images == 0
    batcher.close()


def test_a_thread_that_ends_in_c_is_missed() -> None:
    """Python is not told, and takes the thread for alive."""
    batcher = make(lambda items, group: ctypes.CDLL(None).pthread_exit(None))  # type: ignore
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(batcher.submit, number, 1) for number in range(2)]
        for future in both:
            with pytest.raises(FleetError, match="cannot work any more: its thread ended without"):
                future.result(30)
    batcher.close()


def test_a_batch_that_takes_too_long_is_reported_to_its_callers() -> None:
    work = Recorder()
    batcher = make(work, max_batch=0, batch_timeout_s=0.1, activity=lambda: "group 3")
    with ThreadPoolExecutor(4) as pool:
        first = held(work, batcher, pool)
        (second,) = enqueue(batcher, pool, [(2, 1, None)])
        for future in (first, second):
            with pytest.raises(StuckError, match=r"batcher has been at group 3 for \d+ s"):
                future.result(30)
        work.gate.set()
    batcher.close()
