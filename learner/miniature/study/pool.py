"""Stages of all jobs, in parallel processes that end with this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.errors import FleetError
from cluster.program.console import FAILED, make_console
from learner.miniature.study.names import BASE
from learner.miniature.study.stages import Job, build_networks, evaluate_arm, train_arm


def run_all(jobs: Sequence[Job], processes: int) -> None:
    """Networks of each seed, then training of every arm, then its evaluation; what is done is
    skipped.

    Raises:
        FleetError: a process was killed.
    """
    first_of_seed = {job.seed: job for job in reversed(jobs)}
    stages: tuple[tuple[str, Callable[[Job], None], Sequence[Job]], ...] = (
        ("building networks", build_networks, [*reversed(first_of_seed.values())]),
        ("training arms", train_arm, [job for job in jobs if job.arm.name != BASE]),
        ("evaluating", evaluate_arm, jobs),
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    context = multiprocessing.get_context("spawn")  # a forked process inherits torch's threads
    with (
        Progress(*columns, TimeElapsedColumn(), console=make_console()) as progress,
        ProcessPoolExecutor(processes, mp_context=context, initializer=_start) as pool,
        _ending_processes(pool),
    ):
        for title, stage, its_jobs in stages:
            task = progress.add_task(title, total=len(its_jobs))
            futures = {pool.submit(stage, job): job for job in its_jobs}
            for future in as_completed(futures):
                future.result()
                progress.advance(task)
                if not progress.console.is_terminal:
                    job = futures[future]
                    arm = f", {job.arm.name}" if stage is not build_networks else ""
                    print(f"{title}: seed {job.seed}{arm} done", flush=True)


@contextmanager
def _ending_processes(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Terminate the processes on an interrupt, and drop what was not begun on an error."""
    try:
        yield
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    except BrokenProcessPool as error:
        raise FleetError(
            "a process of the study was killed (is memory short? --workers 1 needs half); the same "
            "command continues"
        ) from error
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def _start() -> None:
    """In a new process: Ctrl-C is the parent's, and without the parent it ends, also within a
    computation, so that the next start is alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(FAILED)
