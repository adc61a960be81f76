"""Slots bound staleness, whatever the order and timing of groups."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import FleetError
from cluster.scheduling.slots import IterationSlots


def test_one_iteration_ahead_by_hand() -> None:
    slots = IterationSlots(groups=2, max_staleness=1)
    assert (slots.capacity, slots.used) == (4, 0)
    assert [slots.admit(), slots.admit()] == [0, 1]
    assert not slots.has_room
    with pytest.raises(FleetError, match="iteration 2 was requested while 4 of 4 slots are taken"):
        slots.admit()
    with pytest.raises(FleetError, match="an older one was not"):
        slots.take(1)
    slots.take(0)
    assert not slots.has_room  # taken is not enough: the weights are not published
    slots.release(0)
    assert (slots.version, slots.used, slots.admit()) == (1, 2, 2)
    assert [slots.version_of(1), slots.version_of(2)] == [0, 1]
    slots.take(1)


def test_nothing_is_consumed_twice_or_released_early() -> None:
    slots = IterationSlots(groups=1, max_staleness=0)
    slots.admit()
    with pytest.raises(FleetError, match="released before it was consumed"):
        slots.release(0)
    slots.take(0)
    with pytest.raises(FleetError, match="it was already"):
        slots.take(0)
    slots.release(0)
    with pytest.raises(FleetError, match="iteration 0 is not pending; pending: none"):
        slots.take(0)


def test_an_interrupted_run_continues_with_what_was_sampled_before() -> None:
    slots = IterationSlots(groups=1, max_staleness=2, first=10)
    with pytest.raises(FleetError, match="max_staleness 2 allows 8 to 10"):
        slots.admit(version=7)
    with pytest.raises(FleetError, match="weights of 11 updates"):
        slots.admit(version=11)
    assert [slots.admit(version=8), slots.admit(version=9), slots.admit()] == [10, 11, 12]
    assert [slots.version_of(number) for number in (10, 11, 12)] == [8, 9, 10]


def test_the_bound_is_reached_where_learning_is_slow() -> None:
    slots = IterationSlots(groups=2, max_staleness=3)
    ages = []
    for iteration in range(6):
        while slots.has_room:
            slots.admit()
        ages.append(iteration - slots.version_of(iteration))
        slots.take(iteration)
        slots.release(iteration)
    assert ages == [0, 1, 2, 3, 3, 3]


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    groups=st.integers(1, 5),
    staleness=st.integers(0, 4),
    first=st.integers(0, 3),
    eager=st.floats(0.05, 0.95),
)
def test_any_timing(seed: int, groups: int, staleness: int, first: int, eager: float) -> None:
    """Staleness never above S, every iteration consumed once and in order, no deadlock."""
    chance = random.Random(seed)
    slots = IterationSlots(groups, staleness, first)
    consumed: list[int] = []
    updates, learning = first, False  # as the outside knows it, apart from the slots
    for _ in range(100_000):
        if len(consumed) == 12:
            break
        if learning and chance.random() < eager:
            slots.release(updates)
            updates, learning = updates + 1, False
        elif not learning and slots.next > updates and chance.random() < eager:
            assert 0 <= updates - slots.version_of(updates) <= staleness
            slots.take(updates)
            consumed.append(updates)
            learning = True
        elif slots.has_room:
            slots.admit()
        assert slots.used <= slots.capacity
    assert consumed == list(range(first, first + 12))
