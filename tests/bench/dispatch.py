"""What the driver takes to decide who gets the next piece of work, against the plan's definition.

python -m tests.bench.dispatch [--waiting 4096] [--workers 256] [--compared 40]

An iteration in simulated time: `--waiting` pieces for `--workers` workers, of one speed or of
several, from the first handing-out to the last end. At every event (a call ends, its worker has
room) the pool is asked until it hands out nothing more; that is what is timed. At some events,
evenly spread, the definition (`tests/unit/old_schedule.py`) decides the same, and must say the
same.
"""

from __future__ import annotations

import argparse
import heapq
import os
import random
import time
from dataclasses import dataclass, field

from cluster import pool as pool_module
from cluster.pool import State, Worker, WorkerPool
from cluster.roles import Resources, Role
from cluster.schedule import Candidate, choose_of_runs
from tests.unit import old_schedule

SPEEDS = {"equal": [1.0], "uneven": [0.7, 1.0, 1.3, 4.0]}
"""Seconds a piece, of worker after worker."""


@dataclass
class Timing:
    """CPU seconds of decisions: a busy machine does not change them much."""

    events: list[float] = field(default_factory=list)
    ours: float = 0.0
    """Of the choices that were compared."""
    definition: float = 0.0


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


def run(seconds: list[float], waiting: int, compared: int) -> Timing:
    """One iteration."""
    pool, timing = made(seconds), Timing()
    for number in range(waiting):
        pool.add(number)
    free = dict.fromkeys(pool.workers, 0.0)
    ends: list[tuple[float, int]] = []
    now, done, every = 0.0, 0, max(waiting // compared, 1)

    def both(runs: list[tuple[int, int]], workers: list[Candidate]) -> tuple[int, int] | None:
        start = time.process_time()
        chosen = choose_of_runs(runs, workers)
        timing.ours += time.process_time() - start
        editions = [edition for edition, count in runs for _ in range(count)]
        start = time.process_time()
        expected = old_schedule.choose(editions, workers)
        timing.definition += time.process_time() - start
        if chosen != expected:
            raise SystemExit(f"chose {chosen}, by definition {expected}")
        return chosen

    while done < waiting:
        pool_module.choose_of_runs = both if done % every == every - 1 else choose_of_runs
        spent = 0.0
        while True:
            start = time.process_time()
            picked = pool.next(now)
            spent += time.process_time() - start
            if picked is None:
                break
            _, worker = picked
            worker.take(1, now)
            free[worker] = max(free[worker], now) + seconds[worker.index]
            heapq.heappush(ends, (free[worker], worker.index))
        if pool_module.choose_of_runs is choose_of_runs:
            timing.events.append(spent)
        now, index = heapq.heappop(ends)
        pool.workers[index].give(1, now)
        done += 1
    pool_module.choose_of_runs = choose_of_runs
    return timing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--waiting", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=256)
    parser.add_argument("--compared", type=int, default=40, help="events that both decide")
    options = parser.parse_args()
    for name, speeds in SPEEDS.items():
        found = {}
        for part in (4, 1):
            workers, waiting = max(options.workers // part, 1), max(options.waiting // part, 1)
            seconds = [speeds[i % len(speeds)] for i in range(workers)]
            timing = found[part] = run(seconds, waiting, options.compared)
            events = sorted(timing.events[1:] or timing.events)  # the first one fills every hand
            mean = sum(events) / len(events) * 1e3
            print(
                f"{name:7s} {waiting:6d} x {workers:4d}: {mean:.3f} ms an event, 99 % below "
                f"{events[len(events) * 99 // 100] * 1e3:.3f} ms (load {os.getloadavg()[0]:.1f})",
                flush=True,
            )
            if part == 1:
                print(f"RESULT dispatch.{name}_ms_per_event={mean:.4f}")
                ratio = timing.definition / max(timing.ours, 1e-9)
                print(f"RESULT dispatch.{name}_definition_over_ours={ratio:.1f}")
        small, large = (sum(found[part].events) / len(found[part].events) for part in (4, 1))
        print(f"RESULT dispatch.{name}_growth_at_four_times_both={large / small:.2f}")


if __name__ == "__main__":
    main()
