"""Killing workers of a fleet on purpose, by the process's own id."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence

import ray

from cluster.messages import TRAIN, SampleRequest
from cluster.ray_backend import heartbeat
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.private import call_inside
from cluster.scheduling.in_flight import Ticket
from cluster.scheduling.pool import Worker


def pid_of(worker: Worker) -> int:
    """Also of one that is busy: a thread beside its work answers."""
    return ray.get(call_inside(worker.handle, lambda _: os.getpid(), heartbeat.GROUP), timeout=60)


def once(act: Callable[[], None]) -> Callable[[], None]:
    """A run that goes back to a checkpoint asks for an iteration again."""
    left = [act]
    return lambda: left.pop()() if left else None


def when_asked_for(
    fleet: RayFleet, iteration: int, strike: Callable[[], None], *, after: bool = True
) -> None:
    """Have something happen right after (or before) a training iteration is asked for."""
    submit = fleet.submit

    def submit_and_strike(requests: Sequence[SampleRequest]) -> Ticket:
        now = (requests[0].stream, requests[0].iteration) == (TRAIN, iteration)
        if now and not after:
            strike()
        ticket = submit(requests)
        if now and after:
            strike()
        return ticket

    fleet.submit = submit_and_strike


def kill_when_asked_for(fleet: RayFleet, victims: Sequence[Worker], iteration: int) -> list[int]:
    """Have the first of some workers killed right after a training iteration was asked for.

    Returns:
        A list that its process id is put into.
    """
    killed: list[int] = []

    def strike() -> None:
        pid = pid_of(victims[0])
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    when_asked_for(fleet, iteration, strike)
    return killed
