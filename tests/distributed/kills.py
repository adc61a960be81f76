"""Killing workers of a fleet on purpose, by the process's own id."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

import ray

from cluster import pulse
from cluster.messages import SampleRequest
from cluster.pool import Worker
from cluster.ray_fleet import RayFleet


def pid_of(worker: Worker) -> int:
    """Also of one that is busy: a thread beside its work answers."""
    call = worker.handle.__ray_call__.options(concurrency_group=pulse.GROUP)
    return ray.get(call.remote(lambda _: os.getpid()), timeout=60)


def kill_when_asked_for(fleet: RayFleet, victims: Sequence[Worker], iteration: int) -> list[int]:
    """Have the first of some workers killed right after a training iteration was asked for.

    Returns:
        A list that its process id is put into.
    """
    submit, killed = fleet.submit, []

    def submit_then_kill(requests: Sequence[SampleRequest]) -> int:
        ticket = submit(requests)
        if requests[0].stream == "train" and requests[0].iteration == iteration:
            pid = pid_of(victims[0])
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        return ticket

    fleet.submit = submit_then_kill
    return killed
