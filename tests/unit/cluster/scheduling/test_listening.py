"""Whose silence counts: decided on plain numbers, with a clock that the test sets."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.ray_backend import heartbeat
from cluster.ray_backend.supervisor import Supervisor
from cluster.roles import Resources, Role
from cluster.scheduling.listening import Listening
from cluster.scheduling.pool import State, Worker, WorkerPool
from cluster.scheduling.restarts import RestartBudget


@dataclasses.dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_gap_counts_up_to_a_bound() -> None:
    clock = Clock()
    listening = Listening(1.0, clock)
    began = clock.now
    for _ in range(4):
        clock.now += 0.5
        assert listening.look() == 0
    assert (listening.silence(began), listening.paused(began)) == (2, 0)
    clock.now += 600
    assert listening.look() == 599
    assert (listening.silence(began), listening.paused(began)) == (3, 599)
    assert listening.silence(clock.now - 10) == 0  # asked within the pause
    clock.now += 1
    listening.look()
    assert listening.silence(clock.now - 1) == 1
    assert listening.silence(began) == 4
    assert listening.silence(clock.now + 5) == 0


@settings(deadline=None)
@given(
    gaps=st.lists(st.integers(1, 80), min_size=1, max_size=30),
    start=st.integers(0, 2000),
)
def test_silence_is_the_sum_of_what_was_listened_to(gaps: list[int], start: int) -> None:
    """Against a list of every tick: eighths of a second, 1 s of each gap counts from its start."""
    clock = Clock(0.0)
    listening = Listening(1.0, clock)
    ticks: list[bool] = []
    for gap in gaps:
        clock.now += gap / 8
        listening.look()
        ticks += [place < 8 for place in range(gap)]
    assert listening.silence(start / 8) == sum(ticks[start:]) / 8


def supervised(clock: Clock) -> tuple[Supervisor, WorkerPool, Listening, list[Worker]]:
    role = Role(name="sampler", factory=object, config=None, resources=Resources(), count=3)
    pool = WorkerPool(role, lambda r, i, *_: Worker(r, i, handle=None), lambda worker: None)
    busy, _, starting = pool.workers
    for worker in pool.workers:
        worker.state, worker.last_response, worker.since = State.SERVING, clock.now, clock.now
    busy.take()
    starting.state, starting.addition = State.STARTING, True
    listening, stopped = Listening(1.0, clock), list[Worker]()
    plan = SimpleNamespace(timeout_s=10.0)
    supervisor = Supervisor(plan, [pool], RestartBudget(3), listening, stopped.append)
    return supervisor, pool, listening, stopped


@pytest.mark.parametrize("pauses", [[600.0], [5.0, 5.0, 5.0, 5.0], [9.9, 3600.0]])
def test_work_in_hand_is_overdue_by_time_listened_to(pauses: list[float]) -> None:
    clock = Clock()
    supervisor, pool, listening, stopped = supervised(clock)
    busy, idle, starting = pool.workers
    for pause in pauses:
        clock.now += pause
        listening.look()
        assert not supervisor.overdue()
    left = 10.0 - len(pauses)
    for _ in range(round(left / 0.5)):
        clock.now += 0.5
        listening.look()
        assert not supervisor.overdue()
    assert starting in pool.workers
    clock.now += 0.5
    listening.look()
    assert supervisor.overdue()
    assert stopped == [busy]
    assert idle in pool.workers
    assert starting not in pool.workers


def test_a_heartbeat_is_missed_by_time_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    answered: list[object] = []
    fake = SimpleNamespace(
        ready=lambda refs: ([ref for ref in refs if ref in answered], []), get=lambda ref: True
    )
    monkeypatch.setattr(heartbeat, "backend", fake)
    monkeypatch.setattr("cluster.clock.monotonic", clock)
    listening = Listening(1.0, clock)
    beats = heartbeat.Heartbeat(10.0, listening)
    role = Role(name="sampler", factory=object, config=None, resources=Resources())

    asked: dict[str, list[object]] = {"one": [], "two": []}

    def call_inside(handle: str, function: object, group: str) -> object:
        asked[handle].append(object())
        return asked[handle][-1]

    monkeypatch.setattr(heartbeat, "call_inside", call_inside)
    one, two = (Worker(role, index, handle=name) for index, name in enumerate(asked))
    assert beats.unresponsive([one, two]) == []
    clock.now += 600
    listening.look()
    assert beats.unresponsive([one, two]) == []
    for _ in range(17):
        clock.now += 0.5
        listening.look()
        answered.extend(asked["one"])
        assert beats.unresponsive([one, two]) == []
    for _ in range(4):
        clock.now += 0.5
        listening.look()
        answered.extend(asked["one"])
        found = beats.unresponsive([one, two])
        if found:
            break
    assert found == [(two, "did not answer heartbeats for 10 s")]
