"""Slots bound staleness, whatever happens to groups on their way."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import FleetError
from cluster.scheduling.buffer import GroupBuffer


def fill(buffer: GroupBuffer, iteration: int) -> None:
    for group in range(buffer.groups):
        buffer.complete(iteration, group, (iteration, group))


def test_one_iteration_ahead_by_hand() -> None:
    buffer: GroupBuffer = GroupBuffer(groups=2, max_staleness=1)
    assert (buffer.capacity, buffer.used) == (4, 0)
    assert [buffer.admit(), buffer.admit()] == [0, 1]
    assert not buffer.has_room
    with pytest.raises(FleetError, match="iteration 2 was asked for while 4 of 4 slots are taken"):
        buffer.admit()
    fill(buffer, 1)
    buffer.complete(0, 1, "b")
    assert buffer.missing(0) == [0]
    with pytest.raises(FleetError, match=r"iteration 0 lacks groups \[0\]"):
        buffer.take(0)
    with pytest.raises(FleetError, match="an older one was not"):
        buffer.take(1)
    buffer.complete(0, 0, "a")
    assert buffer.take(0) == ["a", "b"]
    assert not buffer.has_room  # taken is not enough: the weights are not live
    with pytest.raises(FleetError, match="was consumed already"):
        buffer.complete(0, 0, "late")
    buffer.release(0)
    assert (buffer.live, buffer.used, buffer.admit()) == (1, 2, 2)
    assert [buffer.version(1), buffer.version(2)] == [0, 1]
    assert buffer.take(1) == [(1, 0), (1, 1)]


def test_nothing_is_consumed_twice_or_released_early() -> None:
    buffer: GroupBuffer = GroupBuffer(groups=1, max_staleness=0)
    buffer.admit()
    with pytest.raises(FleetError, match="released before it was consumed"):
        buffer.release(0)
    assert buffer.complete(0, 0, "first")
    assert not buffer.complete(0, 0, "second")  # of a worker that was thought lost
    assert buffer.take(0) == ["first"]
    with pytest.raises(FleetError, match="it was already"):
        buffer.take(0)
    buffer.release(0)
    with pytest.raises(FleetError, match="iteration 0 is not on its way: there are none"):
        buffer.complete(0, 0, "late")


def test_an_interrupted_run_continues_with_what_was_drawn_before() -> None:
    buffer: GroupBuffer = GroupBuffer(groups=1, max_staleness=2, first=10)
    with pytest.raises(FleetError, match="max_staleness 2 allows 8 to 10"):
        buffer.admit(version=7)
    with pytest.raises(FleetError, match="weights of 11 updates"):
        buffer.admit(version=11)
    assert [buffer.admit(version=8), buffer.admit(version=9), buffer.admit()] == [10, 11, 12]
    assert [buffer.version(number) for number in (10, 11, 12)] == [8, 9, 10]


def test_the_bound_is_reached_where_learning_is_slow() -> None:
    buffer: GroupBuffer = GroupBuffer(groups=2, max_staleness=3)
    ages = []
    for iteration in range(6):
        while buffer.has_room:
            fill(buffer, buffer.admit())
        ages.append(iteration - buffer.version(iteration))
        buffer.take(iteration)
        buffer.release(iteration)
    assert ages == [0, 1, 2, 3, 3, 3]


@dataclass
class Fleet:
    """Workers that finish groups in any order, die, and are late."""

    rng: random.Random
    buffer: GroupBuffer
    waiting: list[tuple[int, int]] = field(default_factory=list)
    at_work: list[tuple[int, int]] = field(default_factory=list)
    done: list[tuple[int, int]] = field(default_factory=list)

    def event(self) -> str:
        """One thing that can happen, by chance."""
        can = {
            "admit": self.buffer.has_room,
            "start": bool(self.waiting),
            "finish": bool(self.at_work),
            "die": bool(self.at_work) and self.rng.random() < 0.3,
            "double": bool(self.done) and self.rng.random() < 0.2,
        }
        return self.rng.choice([name for name, possible in can.items() if possible] or ["learn"])

    def happen(self, event: str) -> None:
        pick = self.rng.randrange
        match event:
            case "admit":
                iteration = self.buffer.admit()
                self.waiting += [(iteration, group) for group in range(self.buffer.groups)]
            case "start":
                self.at_work.append(self.waiting.pop(pick(len(self.waiting))))
            case "die":  # asked for again
                self.waiting.append(self.at_work.pop(pick(len(self.at_work))))
            case "finish":
                key = self.at_work.pop(pick(len(self.at_work)))
                assert self.buffer.complete(*key, key)
                self.done.append(key)
            case "double":  # the one that was thought lost answers, too
                key = self.rng.choice(self.done)
                assert not self.buffer.complete(*key, key)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    groups=st.integers(1, 5),
    staleness=st.integers(0, 4),
    first=st.integers(0, 3),
    eager=st.floats(0.05, 0.95),
)
def test_any_order_any_deaths_any_delays(
    seed: int, groups: int, staleness: int, first: int, eager: float
) -> None:
    """Staleness never above S, no group lost or used twice, no deadlock."""
    rng = random.Random(seed)
    buffer: GroupBuffer = GroupBuffer(groups, staleness, first)
    fleet, consumed = Fleet(rng, buffer), []
    live, learning = first, None  # as the outside knows it, apart from the buffer
    for _ in range(100_000):
        if len(consumed) == 12 * groups:
            break
        ready = learning is None and buffer.next > live and not buffer.missing(live)
        if ready and rng.random() < eager:
            version = buffer.version(live)
            content = buffer.take(live)
            assert content == [(live, group) for group in range(groups)]
            assert live - version <= staleness
            consumed += content
            fleet.done = [key for key in fleet.done if key[0] != live]
            learning = live
        elif learning is not None and rng.random() < eager:
            buffer.release(learning)
            live, learning = learning + 1, None
        else:
            fleet.happen(fleet.event())
        assert buffer.used <= buffer.capacity
        assert len(fleet.waiting) + len(fleet.at_work) + len(fleet.done) <= buffer.capacity
    assert consumed == [(first + n, group) for n in range(12) for group in range(groups)]
