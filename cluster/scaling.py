"""How many workers a role should have, from how long work waits for them. Arithmetic alone."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

FREE = 0.25  # share of the target below which a wait counts as none
FULL = 0.75  # busy share that fewer workers may come to
RECENT = 100  # newest waits, for whoever asks
GROWTH = 2.0  # most that one decision multiplies the workers by


@dataclass(frozen=True, kw_only=True)
class AutoscaleConfig:
    """Bounds and target of scaling by queue wait."""

    min: int = 0
    """Fewest workers that scaling leaves; 0 is one."""
    max: int = 0
    """Most workers that scaling starts; 0: their number is left alone."""
    target_wait_s: float = 1.0
    """Mean seconds that work may wait for a worker before more are started."""
    every_s: float = 15.0
    """Seconds of observation behind each decision."""

    def __post_init__(self) -> None:
        if self.min < 0 or self.max < 0:
            raise ValueError(f"min and max must be >= 0, found {self.min} and {self.max}")
        if self.max and self.min > self.max:
            raise ValueError(f"min must be at most max, found {self.min} and {self.max}")
        if self.min and not self.max:
            raise ValueError("min bounds scaling, which max turns on: set max, too")
        if not (self.target_wait_s > 0 and self.every_s > 0):
            raise ValueError("target_wait_s and every_s must be > 0 seconds")

    @property
    def on(self) -> bool:
        return self.max > 0

    def bounded(self, count: int) -> int:
        """The nearest allowed number of workers."""
        return min(max(count, self.min, 1), self.max) if self.on else max(count, 1)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What was seen of a role since the last decision."""

    workers: int
    """That serve."""
    mean_wait_s: float
    """Of work that a worker took up, from when it could have been; 0 where there was none."""
    busy_share: float
    """Share of the time that workers worked, [0, 1]."""


def desired_workers(config: AutoscaleConfig, load: Load) -> int:
    """How many workers there should be.

    More, in proportion to how far the wait is above its target, at most twice as many at once. One
    fewer, when hardly anything waits and the others would still have time to spare.
    """
    if load.mean_wait_s > config.target_wait_s:
        factor = min(load.mean_wait_s / config.target_wait_s, GROWTH)
        return config.bounded(max(load.workers + 1, math.floor(load.workers * factor)))
    idle = load.mean_wait_s < FREE * config.target_wait_s
    if idle and load.busy_share * load.workers <= FULL * (load.workers - 1):
        return config.bounded(load.workers - 1)
    return config.bounded(load.workers)


class LoadMeter:
    """Gathers a role's waits and working time between two decisions."""

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
        """Mean of the newest waits, whenever the observation began; None before the first."""
        return sum(self._recent) / len(self._recent) if self._recent else None

    def age(self, now: float) -> float:
        """Seconds of observation so far."""
        return now - self._since

    def load(self, workers: int, now: float) -> Load:
        """What was seen so far."""
        span = max(now - self._since, 1e-9) * max(workers, 1)
        return Load(
            workers=workers,
            mean_wait_s=self._waited_s / self._waits if self._waits else 0.0,
            busy_share=min(self._busy_s / span, 1.0),
        )

    def restart(self, now: float) -> None:
        """Begin a new observation."""
        self._since, self._waits, self._waited_s, self._busy_s = now, 0, 0.0, 0.0
