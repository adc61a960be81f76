"""Cost and quality of the driver's decisions which worker gets the next task.

python -m tests.bench.dispatch [--waiting 4096] [--workers 256]

An iteration in simulated time: `--waiting` tasks for `--workers` workers, of one speed or of
several, from the first handing-out to the last end. At every event (a call ends, its worker has
room) the pool is asked until it hands out nothing more: CPU seconds of the whole over the events.
The iteration's simulated seconds are compared with the least possible.
"""

from __future__ import annotations

import argparse
import heapq
import os
import random
import time

from cluster.roles import Resources, Role
from cluster.scheduling.pool import State, Worker, WorkerPool

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


def run(seconds: list[float], waiting: int) -> float:
    """One iteration; its simulated seconds."""
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
    return now


def best(seconds: list[float], waiting: int) -> float:
    """Least seconds of an iteration: each task in turn to the worker that ends it first."""
    ends = [(each, each) for each in seconds]
    heapq.heapify(ends)
    for _ in range(waiting):
        end, each = heapq.heappop(ends)
        heapq.heappush(ends, (end + each, each))
    return max(end - each for end, each in ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--waiting", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=256)
    options = parser.parse_args()
    for name, speeds in SPEEDS.items():
        found = {}
        for part in (4, 1):
            workers, waiting = max(options.workers // part, 1), max(options.waiting // part, 1)
            seconds = [speeds[i % len(speeds)] for i in range(workers)]
            start = time.process_time()
            took = run(seconds, waiting)
            found[part] = (time.process_time() - start) / waiting * 1e3
            print(
                f"{name:7s} {waiting:6d} x {workers:4d}: {found[part]:.3f} ms an event", flush=True
            )
        print(f"RESULT dispatch.{name}_ms_per_event={found[1]:.4f}")
        print(f"RESULT dispatch.{name}_growth_at_four_times_both={found[1] / found[4]:.2f}")
        print(f"RESULT dispatch.{name}_seconds_over_least={took / best(seconds, waiting):.3f}")
    print(f"load at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
