"""Virtual time: what happens when, in order."""

from __future__ import annotations

import heapq
from collections.abc import Callable

EPOCH = 1_600_000_000.0  # seconds since 1970 at which every simulation begins


class Event:
    """Something that is to happen, unless it is called off."""

    __slots__ = ("action",)

    def __init__(self, action: Callable[[], None] | None) -> None:
        self.action = action

    def cancel(self) -> None:
        self.action = None


class Engine:
    """A `cluster.clock.Clock` whose time passes from event to event. Events of one time happen in
    the order in which they were planned, so that a simulation repeats exactly."""

    def __init__(self) -> None:
        self.now = 0.0
        self.happened = 0
        """Events so far."""
        self._events: list[tuple[float, int, Event]] = []
        self._numbers = 0

    def monotonic(self) -> float:
        return self.now

    def epoch(self) -> float:
        return EPOCH + self.now

    def sleep(self, seconds: float) -> None:
        self.run(until=self.now + seconds)

    def after(self, seconds: float, action: Callable[[], None]) -> Event:
        """Plan an action."""
        event = Event(action)
        self._numbers += 1
        heapq.heappush(self._events, (self.now + max(seconds, 0.0), self._numbers, event))
        return event

    def run(self, until: float, done: Callable[[], bool] = lambda: False) -> None:
        """Let events happen until `done`, or a time; the clock then shows that time."""
        while not done():
            while self._events and self._events[0][2].action is None:
                heapq.heappop(self._events)
            if not self._events or self._events[0][0] > until:
                self.now = max(self.now, until)
                return
            self.now, _, event = heapq.heappop(self._events)
            action, event.action = event.action, None
            self.happened += 1
            if action is not None:
                action()
