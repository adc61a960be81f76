"""The driver computes, sleeps or is stopped for longer than any bound: nobody is taken for lost."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.session import RaySession
from tests.distributed.stubs import requests, slow_plan

BOUND_S = 4.0
PAUSE_S = 5.0


def stopped(seconds: float) -> None:
    """Stop this process, as a debugger or Ctrl-Z does, for so long."""
    waker = subprocess.Popen(["/bin/sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
    waker.wait()


def test_the_drivers_own_pauses_cost_no_worker(
    ray_session: RaySession, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = dataclasses.replace(slow_plan(0.1, 0.1), heartbeat_s=BOUND_S)
    with RayFleet(plan, ray_session) as fleet:
        fleet.broadcast(1)
        fleet.sample_images(requests(4))
        workers = [worker.name for pool in fleet.pools for worker in pool.workers]
        object.__setattr__(plan, "timeout_s", BOUND_S)  # which would be short for a start

        between = fleet._submit(requests(8), scored=False)
        stopped(PAUSE_S)
        assert len(fleet._collect(between)) == 8

        def pause_once() -> bool:
            monkeypatch.setattr(fleet, "_should_stop", lambda: False)
            time.sleep(PAUSE_S)
            return False

        within = fleet._submit(requests(8), scored=False)
        monkeypatch.setattr(fleet, "_should_stop", pause_once)
        assert len(fleet._collect(within)) == 8

        attend = fleet._attend

        def attend_late(refs, timeout_s):
            time.sleep(PAUSE_S)
            return attend(refs, timeout_s)

        monkeypatch.setattr(fleet, "_attend", attend_late)
        assert fleet.learner.step(0.0) > 0
        assert fleet.restarts == 0
        assert workers == [worker.name for pool in fleet.pools for worker in pool.workers]


@pytest.fixture(scope="module")
def fleet(ray_session: RaySession) -> Iterator[RayFleet]:
    """Two samplers, three slots."""
    plan = dataclasses.replace(slow_plan(0.0, 0.0), slots=3)
    with RayFleet(plan, ray_session) as fleet:
        fleet.broadcast(1)
        yield fleet


def test_groups_move_on_while_the_driver_computes(fleet: RayFleet) -> None:
    batch = fleet._submit(requests(12), scored=False)  # three times what workers have in hand

    def until_all_are_there() -> str:
        deadline = time.monotonic() + 60
        while batch.missing and time.monotonic() < deadline:
            time.sleep(0.05)
        return f"{os.getpid()}, {batch.missing} missing"

    assert fleet.serve_while(until_all_are_there) == f"{os.getpid()}, 0 missing"
    with pytest.raises(ZeroDivisionError):
        fleet.serve_while(lambda: 1 // 0)


def test_galleries_and_evaluations_take_no_more_than_the_slots(
    fleet: RayFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = []

    def advance(ref, advance=fleet._group_calls.advance) -> None:
        most.append(len({id(group) for call in fleet._calls.values() for group in call.groups}))
        advance(ref)

    monkeypatch.setattr(fleet._group_calls, "advance", advance)
    assert len(fleet.sample_images(requests(12))) == 12
    assert max(most) <= 3
