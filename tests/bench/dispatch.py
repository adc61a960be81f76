"""What the driver takes to decide who gets the next task of work, against the plan's definition.

python -m tests.bench.dispatch [--waiting 4096] [--workers 256] [--compared 30]

An iteration in simulated time: `--waiting` tasks for `--workers` workers, of one speed or of
several, from the first handing-out to the last end. At every event (a call ends, its worker has
room) the pool is asked until it hands out nothing more: CPU seconds of the whole over the events.
In a second run the definition (`tests/unit/old_schedule.py`) decides the same at some choices,
evenly spread, and must say the same; both are timed there.
"""

from __future__ import annotations

import argparse
import heapq
import os
import random
import time
from collections.abc import Callable

from cluster.roles import Resources, Role
from cluster.scheduling import pool as pool_module
from cluster.scheduling.dispatch import Candidate, choose_of_runs
from cluster.scheduling.pool import State, Worker, WorkerPool
from tests.unit import old_schedule

SPEEDS = {"equal": [1.0], "uneven": [0.7, 1.0, 1.3, 4.0], "straggler": [1.0] * 63 + [100.0]}
"""Seconds a task, of worker after worker, again and again."""


def made(seconds: list[float]) -> WorkerPool:
    role = Role(
        name="sampler", factory=object, config=None, resources=Resources(), count=len(seconds)
    )
    pool = WorkerPool(role, lambda r, i, *_: Worker(r, i, handle=None), lambda worker: None)
    noise = random.Random(0)
    for worker, each in zip(pool.workers, seconds, strict=True):
        worker.state = State.SERVING
        for _ in range(3):
            worker.pace.add(each * noise.uniform(0.95, 1.05), 1)
    return pool


def run(seconds: list[float], waiting: int) -> None:
    """One iteration."""
    pool = made(seconds)
    for number in range(waiting):
        pool.add(number)
    free = dict.fromkeys(pool.workers, 0.0)
    ends: list[tuple[float, int]] = []
    now, done = 0.0, 0
    while done < waiting:
        while picked := pool.next(now):
            _, worker = picked
            worker.take(1, now)
            free[worker] = max(free[worker], now) + seconds[worker.index]
            heapq.heappush(ends, (free[worker], worker.index))
        now, index = heapq.heappop(ends)
        pool.workers[index].give(1, now)
        done += 1


class Compared:
    """`choose_of_runs`, every so often by the definition as well.

    Args:
        every: choices from one comparison to the next.
    """

    def __init__(self, every: int) -> None:
        self._every, self._choices = every, 0
        self.ours, self.definition, self.slowest = 0.0, 0.0, 0.0

    def __call__(
        self, runs: list[tuple[int, int]], workers: list[Candidate]
    ) -> tuple[int, int] | None:
        chosen = choose_of_runs(runs, workers)
        self._choices += 1
        if self._choices % self._every == 0:
            ours = timed(lambda: choose_of_runs(runs, workers))
            weight_versions = [
                weight_version for weight_version, count in runs for _ in range(count)
            ]
            if chosen != old_schedule.choose(weight_versions, workers):
                raise SystemExit(f"chose {chosen}, which is not what the definition says")
            self.definition += timed(lambda: old_schedule.choose(weight_versions, workers))
            self.ours, self.slowest = self.ours + ours, max(self.slowest, ours)
        return chosen


def timed(work: Callable[[], object]) -> float:
    """Seconds of the fastest of three times."""
    found = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--waiting", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=256)
    parser.add_argument("--compared", type=int, default=30, help="choices that both decide")
    options = parser.parse_args()
    for name, speeds in SPEEDS.items():
        found = {}
        for part in (4, 1):
            workers, waiting = max(options.workers // part, 1), max(options.waiting // part, 1)
            seconds = [speeds[i % len(speeds)] for i in range(workers)]
            start = time.process_time()
            run(seconds, waiting)
            found[part] = (time.process_time() - start) / waiting * 1e3
            print(
                f"{name:7s} {waiting:6d} x {workers:4d}: {found[part]:.3f} ms an event", flush=True
            )
        both = Compared(
            max(options.waiting // options.compared, 1) | 1
        )  # hits and misses alternate
        pool_module.choose_of_runs = both
        run(seconds, waiting)
        pool_module.choose_of_runs = choose_of_runs
        print(f"RESULT dispatch.{name}_ms_per_event={found[1]:.4f}")
        print(f"RESULT dispatch.{name}_growth_at_four_times_both={found[1] / found[4]:.2f}")
        print(f"RESULT dispatch.{name}_slowest_choice_ms={both.slowest * 1e3:.3f}")
        ratio = both.definition / max(both.ours, 1e-9)
        print(f"RESULT dispatch.{name}_definition_over_ours={ratio:.1f}", flush=True)
    print(f"load at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
