"""Time in which this process listened for answers: only that counts as silence of others. Pure.

While this process computes or is stopped, answers may be ready, and their workers are not silent.
So a gap between two polls counts only up to a bound.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

from cluster import clock

LOOK_S = 0.5  # longest wait of one poll
LONGEST_S = 2 * LOOK_S


class Listening:
    """Polls of this process, and the pauses between them.

    Args:
        longest_s: gap between two polls that counts as listening; the rest is a pause.
        clock: monotonic seconds.
    """

    def __init__(
        self, longest_s: float = LONGEST_S, clock: Callable[[], float] = clock.monotonic
    ) -> None:
        self._longest_s, self._clock = longest_s, clock
        self._last = clock()
        self._starts: list[float] = []  # of each pause, in order
        self._ends: list[float] = []
        self._before: list[float] = [0.0]  # seconds of pauses before each of them, and of all

    def look(self) -> float:
        """Record a poll; returns the seconds of pause since the last one."""
        now = self._clock()
        pause = max(now - self._last - self._longest_s, 0.0)
        if pause:
            self._starts.append(now - pause)
            self._ends.append(now)
            self._before.append(self._before[-1] + pause)
        self._last = now
        return pause

    def paused(self, since: float) -> float:
        """Seconds of pauses between a time (of the clock) and the last poll."""
        first = bisect_right(self._ends, since)
        total = self._before[-1] - self._before[first]
        if first < len(self._starts):  # a time within a pause
            total -= max(since - self._starts[first], 0.0)
        return total

    def silence(self, since: float) -> float:
        """Seconds of listening between a time (of the clock) and the last poll."""
        return max(self._last - since - self.paused(since), 0.0)
