"""The fleet's clock, and its replacement by a simulation's."""

from __future__ import annotations

import time

import pytest

from cluster import clock
from cluster.spans import Stopwatch


class Still:
    """Moves only when told to sleep."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def epoch(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_another_clock_is_taken_within_its_block_alone() -> None:
    with clock.using(Still()):
        stopwatch = Stopwatch()
        with stopwatch("sample"):
            clock.sleep(3600.0)
        assert [span.seconds for span in stopwatch.take()] == [3600.0]
    assert clock.monotonic() == pytest.approx(time.monotonic(), abs=5)
    assert clock.epoch() == pytest.approx(time.time(), abs=5)


def test_the_machines_clock_returns_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), clock.using(Still()):
        1 / 0  # noqa: B018
    assert clock.monotonic() == pytest.approx(time.monotonic(), abs=5)


def test_a_clock_that_is_set_meanwhile_changes_no_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = clock.MachineClock()
    before, real = machine.epoch(), time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    assert 0 <= machine.epoch() - before < 5
    assert clock.MachineClock().epoch() < before  # of a process that starts later
