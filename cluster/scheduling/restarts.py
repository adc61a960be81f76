"""The restart budget: how often a lost worker is replaced, and how soon. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.errors import FleetError, LostWhileStoppingError

PERIOD_S = 3600.0
LONGEST_DELAY_S = 60.0


@dataclass
class _Slot:
    times: deque[float] = field(default_factory=deque)
    in_a_row: int = 0


class RestartBudget:
    """Bounds the replacements of each worker within a period, as Erlang's supervisors do: a lost
    machine costs each of its workers one, and a worker that cannot run ends the run soon.

    Args:
        limit: replacements of a worker within the period; one more ends the run.
        period_s: seconds.
        stopping: whether the run was asked to stop: no worker is replaced any more.
    """

    def __init__(
        self,
        limit: int,
        period_s: float = PERIOD_S,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._limit, self._period_s, self.stopping = limit, period_s, stopping
        self._slots: dict[str, _Slot] = {}
        self.spent = 0
        """Replacements so far, of all workers."""

    def spend(self, name: str, why: str, now: float) -> float:
        """Count a lost worker; returns the seconds to wait before it is replaced: none the first
        time, then 1, 2, 4, ... while replacements are lost before they answer.

        Raises:
            FleetError: it was replaced too often.
            LostWhileStoppingError: the run is stopping.
        """
        if self.stopping():
            raise LostWhileStoppingError(f"{name} {why} while the run stopped")
        slot = self._slots.setdefault(name, _Slot())
        while slot.times and now - slot.times[0] > self._period_s:
            slot.times.popleft()
        if len(slot.times) >= self._limit:
            before = f", after {len(slot.times)} replacements in an hour" if self._limit else ""
            raise FleetError(
                f"{name} {why}{before}: look at its log for the reason (out of memory?), or raise "
                f"--max-restarts (now {self._limit})"
            )
        slot.times.append(now)
        slot.in_a_row += 1
        self.spent += 1
        return 0.0 if slot.in_a_row == 1 else min(2.0 ** (slot.in_a_row - 2), LONGEST_DELAY_S)

    def worked(self, name: str) -> None:
        """A worker answered: its next loss starts a new series of delays."""
        if name in self._slots:
            self._slots[name].in_a_row = 0
