"""How many workers a role should have, by how long tasks wait for them. Arithmetic alone."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from cluster.roles import AutoscaleConfig

FREE = 0.25  # share of the target below which a wait counts as none
FULL = 0.75  # busy share that fewer workers may reach
RECENT = 100  # newest waits, for the status
GROWTH = 2.0  # largest factor of one decision


@dataclass(frozen=True, kw_only=True)
class Load:
    """Load of a role since the last decision."""

    workers: int
    """Serving workers."""
    mean_wait_s: float
    """Of started tasks, seconds in the queue; 0 without tasks."""
    busy_share: float
    """Share of the time that workers worked, [0, 1]."""


def desired_workers(config: AutoscaleConfig, load: Load) -> int:
    """The number of workers to have.

    More in proportion to the wait over its target, at most twice as many at once. One fewer when
    tasks hardly wait and the others would still be idle part of the time.
    """
    if load.mean_wait_s > config.target_wait_s:
        factor = min(load.mean_wait_s / config.target_wait_s, GROWTH)
        return config.bounded(max(load.workers + 1, math.floor(load.workers * factor)))
    idle = load.mean_wait_s < FREE * config.target_wait_s
    if idle and load.busy_share * load.workers <= FULL * (load.workers - 1):
        return config.bounded(load.workers - 1)
    return config.bounded(load.workers)


class LoadMeter:
    """Measures a role's waits and working time between two decisions."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._waits, self._waited_s = 0, 0.0
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._busy_s = 0.0

    def waited(self, seconds: float) -> None:
        self._waits, self._waited_s = self._waits + 1, self._waited_s + seconds
        self._recent.append(seconds)

    def worked(self, seconds: float) -> None:
        self._busy_s += seconds

    @property
    def recent_wait_s(self) -> float | None:
        """Mean of the newest waits, also of earlier observations; None before the first."""
        return sum(self._recent) / len(self._recent) if self._recent else None

    def age(self, now: float) -> float:
        """Seconds of observation so far."""
        return now - self._since

    def load(self, workers: int, now: float) -> Load:
        """The load so far."""
        span = max(now - self._since, 1e-9) * max(workers, 1)
        return Load(
            workers=workers,
            mean_wait_s=self._waited_s / self._waits if self._waits else 0.0,
            busy_share=min(self._busy_s / span, 1.0),
        )

    def restart(self, now: float) -> None:
        """Start a new observation."""
        self._since, self._waits, self._waited_s, self._busy_s = now, 0, 0.0, 0.0
