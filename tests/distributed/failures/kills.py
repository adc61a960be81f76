"""Kills workers of a fleet by process id, at a given iteration."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence

import ray

from cluster.messages import TRAIN, SampleRequest
from cluster.ray_backend import heartbeat
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.private import call_inside
from cluster.scheduling.in_flight import PendingBatch
from cluster.scheduling.pool import Worker


def pid_of(worker: Worker) -> int:
    """The process id of a worker, busy or not: its heartbeat thread answers."""
    return ray.get(
        call_inside(worker.handle, lambda _: os.getpid(), group=heartbeat.GROUP), timeout=60
    )


def once(act: Callable[[], None]) -> Callable[[], None]:
    """`act`, on the first call only: a run that rolls back requests an iteration twice."""
    left = [act]
    return lambda: left.pop()() if left else None


def when_asked_for(
    fleet: RayFleet, iteration: int, inject: Callable[[], None], *, after: bool = True
) -> None:
    """Inject a failure right after (or before) a training iteration is requested."""
    submit = fleet.submit

    def submit_and_inject(requests: Sequence[SampleRequest]) -> PendingBatch:
        now = (requests[0].stream, requests[0].iteration) == (TRAIN, iteration)
        if now and not after:
            inject()
        batch = submit(requests)
        if now and after:
            inject()
        return batch

    fleet.submit = submit_and_inject


def kill_when_asked_for(fleet: RayFleet, victims: Sequence[Worker], iteration: int) -> list[int]:
    """Kill the first of some workers right after a training iteration is requested.

    Returns:
        A list that receives its process id.
    """
    killed: list[int] = []

    def inject() -> None:
        pid = pid_of(victims[0])
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    when_asked_for(fleet, iteration, inject)
    return killed
