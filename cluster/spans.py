"""Spans of time of workers, and the stopwatch that records them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from cluster import clock

DRIVER = "driver"
WAIT = "wait_"  # prefix of phases in which the driver waits for a role
QUEUE = "queue"  # waiting inside a worker
PUBLISHING = "broadcast"  # while others work


class Span(NamedTuple):
    """One phase of one worker, in seconds since the epoch: an event of the timeline."""

    worker: str
    phase: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


def works(span: Span) -> bool:
    """Whether a worker works in a phase, rather than waits."""
    return span.phase not in (QUEUE, PUBLISHING) and not span.phase.startswith(WAIT)


def role_of(worker: str) -> str:
    """sampler-3 -> sampler."""
    return re.sub(r"-\d+$", "", worker)


class Stopwatch:
    """Spans of this process."""

    def __init__(self, worker: str = DRIVER) -> None:
        self._worker = worker
        self._spans: list[Span] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time what is inside; also if it fails."""
        start = clock.epoch()
        try:
            yield
        finally:
            self._spans.append(Span(self._worker, phase, start, clock.epoch()))

    def take(self) -> tuple[Span, ...]:
        """The spans since the last call."""
        spans, self._spans = tuple(self._spans), []
        return spans
