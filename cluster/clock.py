"""The clock by which a fleet decides: this machine's, or that of a simulation, whose hours pass in
seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds that never go back."""
        ...

    def epoch(self) -> float:
        """Seconds since 1970 (UTC)."""
        ...

    def sleep(self, seconds: float) -> None: ...


def _running() -> float:
    """Seconds that never go back, with those in which the machine slept where the system tells."""
    kind = getattr(time, "CLOCK_BOOTTIME", None)  # Linux
    return time.monotonic() if kind is None else time.clock_gettime(kind)


class MachineClock:
    """The machine's own. `epoch` runs on from the time at which this process started, whatever the
    machine's clock is set to later: two of its times differ by the seconds between them."""

    def __init__(self) -> None:
        self._offset = time.time() - _running()

    def monotonic(self) -> float:
        return time.monotonic()

    def epoch(self) -> float:
        return _running() + self._offset

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


_clock: Clock = MachineClock()


def monotonic() -> float:
    """Seconds that never go back."""
    return _clock.monotonic()


def epoch() -> float:
    """Seconds since 1970 (UTC)."""
    return _clock.epoch()


def sleep(seconds: float) -> None:
    _clock.sleep(seconds)


@contextmanager
def using(clock: Clock) -> Iterator[None]:
    """Take another clock in this process, in all threads, until the end of the block."""
    global _clock
    before, _clock = _clock, clock
    try:
        yield
    finally:
        _clock = before
