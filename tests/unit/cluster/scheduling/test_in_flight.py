"""How much is asked for at a time: decided without a fleet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from types import SimpleNamespace

import pytest

from cluster.errors import FleetError, StopRequestedError
from cluster.scheduling.in_flight import PendingBatch, PendingBatches
from cluster.scheduling.listening import Listening

SLOTS = 6


class Desk:
    """Results come one a poll, in any order."""

    def __init__(self, seed: int = 0) -> None:
        self.random, self.most, self.asked = Random(seed), 0, 0
        self.open: list[tuple[PendingBatch, int, object]] = []
        self.turns, self.stop_after = 0, 1 << 30
        self.listening = Listening()
        self.batches = PendingBatches(
            SimpleNamespace(slots=SLOTS, timeout_s=0.05),  # type: ignore[arg-type]
            self.listening,
            self.turn,
            lambda: self.turns >= self.stop_after,
            lambda: "nobody",
        )

    def submit(self, *results: object) -> PendingBatch:
        batch = self.batches.add(len(results))
        self.open += [(batch, position, result) for position, result in enumerate(results)]
        self.asked += len(results)
        self.most = max(self.most, self.batches.missing)
        return batch

    def turn(self) -> bool:
        self.turns += 1
        self.listening.look()
        live = [each for each in self.open if not each[0].abandoned]
        if not live:
            return False
        chosen = self.random.choice(live)
        self.open.remove(chosen)
        batch, position, result = chosen
        batch.put(position, result)
        return True

    def submits(self, count: int) -> Iterator[Callable[[], PendingBatch]]:
        return (lambda number=number: self.submit(number) for number in range(count))


@pytest.mark.parametrize("seed", range(5))
def test_any_number_is_asked_for_slot_by_slot_and_comes_in_order(seed: int) -> None:
    desk = Desk(seed)
    assert [*desk.batches.stream(desk.submits(100))] == [*range(100)]
    assert desk.most == SLOTS
    assert not desk.batches.missing
    assert [*desk.batches.stream(desk.submits(0))] == []


def test_what_trains_takes_the_same_slots() -> None:
    desk = Desk()
    training = desk.submit(*"abcdef")
    assert [*desk.batches.stream(desk.submits(20))] == [*range(20)]
    assert desk.most == SLOTS
    assert desk.batches.collect(training) == [*"abcdef"]


def test_answers_that_are_not_taken_hold_their_slots() -> None:
    desk = Desk()
    stream = desk.batches.stream(desk.submits(100))
    assert next(stream) == 0
    while desk.batches.missing:
        desk.turn()
    assert desk.asked <= SLOTS + 1
    assert next(stream) == 1
    stream.close()
    assert not desk.batches.missing


def test_a_stop_is_honoured_between_groups_and_leaves_nothing() -> None:
    desk = Desk()
    desk.stop_after = 20
    taken = []
    with pytest.raises(StopRequestedError):
        taken.extend(desk.batches.stream(desk.submits(100)))
    assert desk.asked <= 20 + SLOTS
    assert not desk.batches.missing
    assert all(batch.abandoned for batch, _, _ in desk.open)


def test_a_wait_in_which_nothing_happens_ends() -> None:
    desk = Desk()
    batch = desk.submit("a")
    desk.open.clear()
    with pytest.raises(FleetError, match=r"nothing happened for 0\.05 s \(nobody\)"):
        desk.batches.collect(batch)
