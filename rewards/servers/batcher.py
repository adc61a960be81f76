"""Batches requests of many threads: a bounded queue and one worker thread.

A batch starts when it is full or when its first request has waited `max_wait_s`. Callers prepare
their next requests while the worker thread runs a batch.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from cluster.clock import epoch
from cluster.errors import FleetError, StuckError
from cluster.messages import ServerStats
from rewards.scorers.isolation import describe

Item = TypeVar("Item")
Result = TypeVar("Result")

NEWEST = 512  # requests in the statistics of waits
CHECK_S = 1.0  # seconds between a caller's checks of the worker thread


@dataclass(frozen=True)
class Work:
    """Times of a request, seconds since the epoch."""

    arrived: float
    start: float
    end: float
    first: bool
    """The request is the first of its batch; used to count batches."""


@dataclass
class Entry(Generic[Item, Result]):
    """One request in the queue."""

    item: Item
    group: object
    """A batch holds entries of one group only."""
    size: int
    arrived: float = field(default_factory=epoch)
    deadline: float = 0.0
    """`time.monotonic()` at which its batch starts, full or not."""
    future: Future[tuple[Result, Work]] = field(default_factory=Future)


class Batcher(Generic[Item, Result]):
    """Call `submit` from any number of threads; `work` runs in one worker thread.

    Args:
        work: (items of one group, the group) -> results in the same order. After an exception the
            items of the batch are retried one by one, so that only items that fail alone fail.
        max_batch: largest sum of sizes in a batch; 0 runs every item alone. A larger item runs
            alone.
        max_wait_s: longest wait of a batch's first item for others.
        max_queued: largest sum of sizes in the queue; a larger item queues alone.
        queue_timeout_s: longest wait of a caller for room in the queue.
        batch_timeout_s: longest run of a batch.
        activity: describes the running batch, for the error of one that takes longer.
    """

    def __init__(
        self,
        work: Callable[[list[Item], object], Sequence[Result]],
        *,
        max_batch: int,
        max_wait_s: float,
        max_queued: int,
        queue_timeout_s: float = 600.0,
        batch_timeout_s: float = 600.0,
        name: str = "batcher",
        activity: Callable[[], str] = lambda: "a batch",
    ) -> None:
        self._work, self._name, self._queue_timeout_s = work, name, queue_timeout_s
        self._batch_timeout_s, self._activity = batch_timeout_s, activity
        self._max_batch, self._max_wait_s, self._max_queued = max_batch, max_wait_s, max_queued
        self._queue: deque[Entry[Item, Result]] = deque()
        self._queued = 0
        self._changed = threading.Condition()
        self._closed = False
        self._failure: str | None = None  # why the thread ended without `close`
        self._begun: float | None = None  # start of the running batch, by `time.monotonic`
        self._waits: deque[float] = deque(maxlen=NEWEST)
        self._requests = self._images = self._batches = 0
        self._busy_s = 0.0
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def submit(self, item: Item, size: int, group: object = None) -> tuple[Result, Work]:
        """Queue an item and wait for its result.

        Raises:
            FleetError: closed, no room in the queue within `queue_timeout_s`, or the worker thread
                ended.
            StuckError: this batch or an earlier one runs for longer than `batch_timeout_s`.
            Exception: raised by `work` for this item.
        """
        entry = Entry[Item, Result](item, group, size)
        with self._changed:
            room = self._changed.wait_for(
                lambda: self._closed or self._failure or self._room(size), self._queue_timeout_s
            )
            self._refuse()
            if not room:
                raise FleetError(
                    f"{self._name}: {self._queued} images wait already (max_queued "
                    f"{self._max_queued}), and there was no room for {size} more within "
                    f"{self._queue_timeout_s:g} s: start more servers, or ask for less at a time"
                )
            entry.arrived = epoch()
            entry.deadline = time.monotonic() + self._max_wait_s
            self._queue.append(entry)
            self._queued += size
            self._changed.notify_all()
        while not wait([entry.future], CHECK_S).done:
            self._check()
        return entry.future.result()

    def _refuse(self) -> None:
        if self._failure:
            raise FleetError(self._failure)
        if self._closed:
            raise FleetError(f"{self._name} is closed")

    def _check(self) -> None:
        """Check the worker thread, for a waiting caller.

        Raises:
            StuckError: its batch runs for too long.
            FleetError: it ended.
        """
        if not self._alive():
            self._end("its thread ended without an error", [])
            raise FleetError(self._failure)
        if seconds := self._overtime():
            raise StuckError(
                f"{self._name} has been at {self._activity()} for {seconds:.0f} s (--timeout-s "
                "sets the bound)"
            )

    def _overtime(self) -> float:
        """Seconds that the batch has run, if more than allowed; else 0."""
        begun = self._begun
        seconds = 0.0 if begun is None else time.monotonic() - begun
        return seconds if seconds > self._batch_timeout_s else 0.0

    def _alive(self) -> bool:
        """Python reports a thread that ended in C code as alive; Linux's /proc does not."""
        tasks, number = Path("/proc/self/task"), self._thread.native_id
        return self._thread.is_alive() and (not tasks.is_dir() or (tasks / str(number)).exists())

    def stats(self) -> ServerStats:
        """Counters so far; `failed` is left to the caller."""
        with self._changed:
            waits = sorted(self._waits)
            return ServerStats(
                requests=self._requests,
                images=self._images,
                batches=self._batches,
                queued_images=self._queued,
                wait_mean_s=sum(waits) / len(waits) if waits else 0.0,
                wait_p95_s=waits[int(0.95 * (len(waits) - 1))] if waits else 0.0,
                busy_s=self._busy_s,
            )

    def close(self) -> None:
        """Refuse new items and fail queued ones."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        while self._alive() and not self._overtime():
            self._thread.join(CHECK_S)

    def _room(self, size: int) -> bool:
        return not self._queue or self._queued + size <= self._max_queued

    def _serve(self) -> None:
        batch: list[Entry[Item, Result]] = []
        try:
            while batch := self._next():
                self._do(batch)
        except BaseException as error:  # of this loop; exceptions of `work` are results
            self._end(describe(error), batch)

    def _do(self, batch: list[Entry[Item, Result]]) -> None:
        start, self._begun = epoch(), time.monotonic()
        results = self._results(batch)
        end, self._begun = epoch(), None
        with self._changed:
            self._batches += 1
            self._busy_s += end - start
            self._requests += len(batch)
            self._images += sum(entry.size for entry in batch)
            self._waits.extend(start - entry.arrived for entry in batch)
        for index, (entry, result) in enumerate(zip(batch, results, strict=True)):
            if isinstance(result, BaseException):
                entry.future.set_exception(result)
            else:
                entry.future.set_result((result, Work(entry.arrived, start, end, index == 0)))

    def _results(self, batch: list[Entry[Item, Result]]) -> list[Result | BaseException]:
        try:
            results = list(self._work([entry.item for entry in batch], batch[0].group))
            if len(results) != len(batch):
                raise FleetError(f"{self._name}: {len(results)} results of {len(batch)} requests")
            return [*results]
        except BaseException as error:  # becomes the result of its request
            if len(batch) == 1:
                # a scorer's SystemExit must not end the caller's thread
                return [error if isinstance(error, Exception) else self._ended_by(error)]
            return [self._results([entry])[0] for entry in batch]

    def _ended_by(self, error: BaseException) -> FleetError:
        return FleetError(f"{self._name}: {describe(error)}")

    def _end(self, why: str, batch: list[Entry[Item, Result]]) -> None:
        """The thread ended: fail the running batch and the queue, refuse new items."""
        with self._changed:
            self._failure = self._failure or f"{self._name} cannot work any more: {why}"
            self._begun = None
            for entry in batch:
                if not entry.future.done():
                    entry.future.set_exception(FleetError(self._failure))
            self._fail_waiting(self._failure)
            self._changed.notify_all()

    def _next(self) -> list[Entry[Item, Result]]:
        """The next batch, in order of arrival; empty when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._queue)
            if self._queue and self._max_batch:
                deadline = self._queue[0].deadline
                while not self._closed and self._ready_size() < self._max_batch:
                    left = deadline - time.monotonic()
                    if left <= 0 or not self._changed.wait(left):
                        break
            if self._closed:
                self._fail_waiting(f"{self._name} was closed")
                return []
            batch = self._take()
            self._queued -= sum(entry.size for entry in batch)
            self._changed.notify_all()
            return batch

    def _ready_size(self) -> int:
        group = self._queue[0].group
        return sum(entry.size for entry in self._queue if entry.group == group)

    def _take(self) -> list[Entry[Item, Result]]:
        first = self._queue.popleft()
        batch, size = [first], first.size
        left: deque[Entry[Item, Result]] = deque()
        for entry in self._queue:
            if entry.group == first.group and size + entry.size <= self._max_batch:
                batch.append(entry)
                size += entry.size
            else:
                left.append(entry)
        self._queue = left
        return batch

    def _fail_waiting(self, why: str) -> None:
        while self._queue:
            self._queue.popleft().future.set_exception(FleetError(why))
        self._queued = 0
